"""Know of an optimizer that plugins changed who they are, and whether it hides its state from checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any, NoReturn

import attrs

from nemo_dist.errors import CheckpointError


@attrs.define
class _Steps:
    """The plugins that made an optimizer, whether the user's own would keep state, and its steps with gradients."""

    plugins: tuple[str, ...]
    keeps: bool
    taken: int = 0


_KEY = "_nemo_dist_steps"  # on the optimizer


def watch_steps(optimizer: Any, plugins: Sequence[str], keeps: bool) -> None:
    """Count the steps of *optimizer*, which *plugins* made or changed; *keeps*: whether the user's would have state."""
    steps, found = _Steps(tuple(plugins), keeps), optimizer.step

    def step(_: Any, *args: Any, **options: Any) -> Any:
        steps.taken += _has_gradients(optimizer)  # without any, torch's own would have no state either
        return found(*args, **options)

    setattr(optimizer, _KEY, steps)
    optimizer.step = MethodType(step, optimizer)  # torch's schedulers expect a method


def _has_gradients(optimizer: Any) -> bool:
    groups = getattr(optimizer, "param_groups", ())
    return any(parameter.grad is not None for group in groups for parameter in group["params"])


def makers(optimizer: Any) -> list[str]:
    """Return the names of the plugins that made or changed *optimizer*."""
    steps: _Steps | None = getattr(optimizer, _KEY, None)
    return [] if steps is None else list(steps.plugins)


def hides_state(optimizer: Any) -> bool:
    """Whether *optimizer* should have state by now, and shows none on this rank."""
    steps: _Steps | None = getattr(optimizer, _KEY, None)
    return steps is not None and steps.keeps and steps.taken > 0 and not any(optimizer.state.values())


def refuse_hidden_state(plugins: Sequence[str]) -> NoReturn:
    """Raise CheckpointError for an optimizer that *plugins* made, which shows no state on any rank."""
    raise CheckpointError(
        f"the optimizer that plugin {' and '.join(map(repr, plugins))} made has taken steps and shows no state on "
        "any rank, so a checkpoint would lose its moments; what its hook returns must have them in .state, by "
        "parameter and kind"
    )
