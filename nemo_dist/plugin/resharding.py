"""Put a model's shards back in place when a forward left it with gathered parameters and no backward followed.

A strategy may replace the shards of a module by gathered parameters for a forward, and put them back in the backward.
Where none follows (an evaluation, ``generate``), whoever then lists, steps, loads or saves parameters would meet the
gathered ones, and the next forward would compute with their old values. So a strategy says here, once for each model,
how its shards come back; ``reshard`` does it for the core and for other plugins, and hooks of the model for users.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import attrs

from nemo_dist.hf_model import inner_model

if TYPE_CHECKING:
    from torch import nn

_KEY = "_nemo_dist_resharding"  # in the model's __dict__


@attrs.define(eq=False)
class _Resharding:
    """The actions of one model, and how many ``keep_gathered`` contexts it is in."""

    actions: list[Callable[[], None]] = attrs.field(factory=list)
    gathers: list[Callable[[], None]] = attrs.field(factory=list)
    kept: int = 0

    def run(self) -> None:
        for action in self.actions:
            action()

    def between_steps(self, *_: Any) -> None:
        from nemo_dist.torch_private import in_backward

        if not self.kept and not in_backward():
            self.run()

    def after_forward(self, *_: Any) -> None:
        from torch import is_grad_enabled

        if not is_grad_enabled():
            self.between_steps()


def reshard_with(model: nn.Module, action: Callable[[], None], gather: Callable[[], None] | None = None) -> None:
    """Let *action* put the shards of *model*, a transformers model, back; a strategy calls this after it sharded it.

    It runs before every forward of *model*, as weights may have changed since the last one, and after every forward
    without gradients; within ``keep_gathered`` only at both ends. It must be cheap where all shards are in place, run
    no collective, and do no harm between a forward and its backward. *gather* puts the gathered parameters in place of
    all shards, which is collective.
    """
    found: _Resharding | None = model.__dict__.get(_KEY)
    if found is None:
        found = model.__dict__[_KEY] = _Resharding()
        model.register_forward_pre_hook(found.between_steps, prepend=True)
        model.register_forward_hook(found.after_forward)
    found.actions.append(action)
    found.gathers += [] if gather is None else [gather]


def reshard(parts: Iterable[nn.Module]) -> None:
    """Put the shards of *parts* back, so that their parameters are those that an optimizer steps; no communication."""
    for found in _all(parts):
        found.run()


@contextmanager
def gathered(parts: Iterable[nn.Module]) -> Iterator[None]:
    """Within the context, every rank has the parameters of *parts* whole, to read; collective over all ranks."""
    found = _all(parts)
    for one in found:
        one.run()
        for gather in one.gathers:
            gather()
    try:
        yield
    finally:
        for one in found:
            one.run()


@contextmanager
def keep_gathered(parts: Iterable[nn.Module]) -> Iterator[None]:
    """Within the context weights do not change, so a forward may use what an earlier one gathered.

    For code that runs several forwards in a row: microbatches, a step with its survey. Contexts nest.
    """
    found = _all(parts)
    for one in found:
        one.between_steps()
        one.kept += 1
    try:
        yield
    finally:
        for one in found:
            one.kept -= 1
    for one in found:  # not after an error, when collectives may be under way; the next forward does it then
        one.between_steps()


def _all(parts: Iterable[nn.Module]) -> list[_Resharding]:
    attached = (inner_model(part).__dict__.get(_KEY) for part in parts)
    return [found for found in attached if found is not None]
