"""The canonical state: what the ranks hold, under the names and shapes of the whole Hugging Face model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from nemo_dist.training.runtime import Runtime


def own_state(runtime: Runtime) -> dict[str, Tensor]:
    """Return this rank's parameters and persistent buffers, each once, under their names in the whole model."""
    state: dict[str, Tensor] = {}
    for part in runtime.parts:
        # The state dict, not the parameters: its hooks give back the shards where a forward left gathered ones.
        own = {name: value for name, value in part.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
        names = canonical_names(part, own)
        for name, tensor in own.items():
            state.setdefault(names[name], tensor)
    return state


def model_state(runtime: Runtime) -> dict[str, Tensor]:
    """Return the canonical state of this rank's parameters and persistent buffers."""
    return exported(runtime, own_state(runtime))


def exported(runtime: Runtime, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return *state*, tensors that are laid out like parameters by their names, as the canonical state."""
    result = {name: tensor.detach() for name, tensor in state.items()}
    runtime.setup.calls.export_state(state=result, parts=list(runtime.parts), mesh=runtime.mesh)
    return result


@contextmanager
def imported(runtime: Runtime, state: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Give *state* as the canonical state, to be filled; at the end its values are those of *state*."""
    canonical = exported(runtime, state)
    yield canonical
    runtime.setup.calls.import_state(state=canonical, parts=list(runtime.parts), mesh=runtime.mesh)
    with torch.no_grad():
        for name, tensor in state.items():
            if not _same_memory(canonical[name], tensor):
                tensor.copy_(canonical[name])


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return _address(one) == _address(other)


def _address(tensor: Any) -> tuple[int, ...]:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return (local.data_ptr(), *local.shape, *local.stride())


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
