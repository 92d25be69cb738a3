"""The canonical state dict: this rank's tensors under the names and global shapes of the whole Hugging Face model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nemo_dist.checkpoint.sharded_model import ShardedModel
from nemo_dist.hf_model import name_root
from nemo_dist.mesh.dtensor import local
from nemo_dist.plugin.resharding import reshard


def own_state(model: ShardedModel) -> dict[str, Tensor]:
    """Return this rank's parameters and persistent buffers, each once, under their names in the whole model."""
    reshard(model.parts)
    state: dict[str, Tensor] = {}
    for name, tensor in _named(model):
        state.setdefault(name, tensor)
    return state


def copies(model: ShardedModel, state: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return pairs of a tensor of *state*, which is that of ``own_state``, and another tensor of the same name here.

    A rank with the first and the last stage of a pipeline has a tied weight twice; both are trained to be equal.
    """
    pairs = {id(tensor): (state[name], tensor) for name, tensor in _named(model) if tensor is not state[name]}
    return list(pairs.values())


def _named(model: ShardedModel) -> Iterator[tuple[str, Tensor]]:
    for part in map(name_root, model.parts):
        own = {name: value for name, value in part.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
        names = canonical_names(part, own)
        for name, tensor in own.items():
            yield names[name], tensor


def model_state(model: ShardedModel) -> dict[str, Tensor]:
    """Return the canonical state of this rank's parameters and persistent buffers."""
    return exported(model, own_state(model))


def exported(model: ShardedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the canonical state of *state*, whose tensors are laid out like the parameters of the same names."""
    result = {name: tensor.detach() for name, tensor in state.items()}
    model.calls.export_state(state=result, parts=list(model.parts), mesh=model.mesh)
    return result


@contextmanager
def imported(model: ShardedModel, state: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield the canonical state of *state* to be filled; at the end, copy its values back into *state*."""
    canonical = exported(model, state)
    yield canonical
    model.calls.import_state(state=canonical, parts=list(model.parts), mesh=model.mesh)
    with torch.no_grad():
        for name, tensor in state.items():
            if not _same_memory(canonical[name], tensor):
                tensor.copy_(canonical[name])


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return _address(one) == _address(other)


def _address(tensor: Tensor) -> tuple[int, ...]:
    own = local(tensor)
    return (own.data_ptr(), *own.shape, *own.stride())


def canonical_names(part: nn.Module, state: Mapping[str, Any]) -> dict[str, str]:
    """Return the name under which each entry of *state* is saved: a tied weight has the name of its source."""
    tied: Mapping[str, str] = getattr(part, "all_tied_weights_keys", None) or {}
    names = {name: name for name in state}
    for target, source in tied.items():
        if target in state and (source not in state or state[source] is state[target]):
            names[target] = source
    _join(names, state.items())
    return names


def _join(names: dict[str, str], items: Iterable[tuple[str, Any]]) -> None:
    """Map entries that share one tensor to the name of the first, even where the model does not declare them tied."""
    first: dict[int, str] = {}
    for name, tensor in items:
        names[name] = first.setdefault(id(tensor), names[name])
