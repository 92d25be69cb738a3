"""The canonical state: what the ranks hold, under the names and shapes of the whole Hugging Face model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from nemo_dist.runtime import Runtime


def model_state(runtime: Runtime) -> dict[str, Tensor]:
    """Return this rank's parameters and persistent buffers in the canonical state, each tensor once."""
    state: dict[str, Tensor] = {}
    for part in runtime.parts:
        # The state dict, not the parameters: its hooks give back the shards where a forward left gathered ones.
        own = {name: value for name, value in part.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
        names = canonical_names(part, own)
        for name, tensor in own.items():
            state.setdefault(names[name], tensor.detach())
    to_canonical(runtime, state)
    return state


def to_canonical(runtime: Runtime, state: dict[str, Tensor]) -> None:
    """Let the plugins rewrite *state*, a tensor per parameter name, to the canonical state."""
    runtime.setup.calls.export_state(state=state, parts=list(runtime.parts), mesh=runtime.mesh)


def canonical_names(part: nn.Module, state: Mapping[str, Any]) -> dict[str, str]:
    """Return the name under which each entry of *state* is saved: that of the source, for a tied weight."""
    tied: Mapping[str, str] = getattr(part, "all_tied_weights_keys", None) or {}
    names = {name: name for name in state}
    for target, source in tied.items():
        if target in state and (source not in state or state[source] is state[target]):
            names[target] = source
    _join(names, state.items())
    return names


def _join(names: dict[str, str], items: Iterable[tuple[str, Any]]) -> None:
    """Give entries that are one tensor one name, also where the model does not declare them tied."""
    first: dict[int, str] = {}
    for name, tensor in items:
        names[name] = first.setdefault(id(tensor), names[name])
