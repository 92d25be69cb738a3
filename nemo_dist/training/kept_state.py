"""What modules keep from one forward for the next: buffers, and plain attributes of modules of the user's own classes.

A forward that is run once more than one process would run it (to survey a step, or in a proof) runs on copies of these.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nemo_dist.hf_model import is_own_code

_INNER = frozenset({"_parameters", "_buffers", "_modules", "training"})  # in the __dict__ of every module
_SEQUENCES = (list, tuple, set, deque)


@contextmanager
def on_copies(models: Iterable[nn.Module]) -> Iterator[None]:
    """Within the context *models* keep in copies what they keep; at its end they have what they had before."""
    kept = list(_holders(models))
    copies: dict[int, Any] = {}
    for holder, values in kept:
        holder |= {name: _copy(value, copies) for name, value in values.items()}
    try:
        yield
    finally:
        for holder, values in kept:
            for name in _plain(holder).keys() - values.keys():
                del holder[name]
            holder |= values


def kept_by(model: nn.Module) -> dict[str, Any]:
    """Return copies of what the modules of *model* keep, by a name for messages."""
    found: dict[str, Any] = {}
    for prefix, module in model.named_modules():
        start = f"{prefix}." if prefix else ""
        found |= {f"buffer {start}{name}": value for name, value in _plain(module._buffers).items()}
        if is_own_code(module):
            found |= {f"attribute {start}{name}": value for name, value in _plain(vars(module)).items()}
    return {name: _copy(value, {}) for name, value in found.items()}


def is_equal(one: Any, other: Any) -> bool:
    """Whether two values of ``kept_by`` are equal; NaN is equal to itself."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(_numbers(one), _numbers(other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_equal(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple | deque):
        return len(one) == len(other) and all(map(is_equal, one, other))
    return bool(one == other) or one != one


def _numbers(tensor: Tensor) -> Tensor:
    return tensor.nan_to_num() if tensor.is_floating_point() else tensor


def _holders(models: Iterable[nn.Module]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield the dicts in which modules keep something, each with what may change in a forward."""
    modules = {id(module): module for model in models for module in model.modules()}
    for module in modules.values():
        yield module._buffers, _plain(module._buffers)
        if is_own_code(module):
            yield vars(module), _plain(vars(module))


def _plain(holder: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in holder.items() if name not in _INNER and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    """Whether *value* is a tensor with values, a number, text or a container of these; a parameter is not."""
    if isinstance(value, Tensor):
        return not value.is_meta and not isinstance(value, nn.Parameter)
    if type(value) is dict:
        return all(map(_is_plain, value.values()))
    if type(value) in _SEQUENCES:
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | complex | str | None)


def _copy(value: Any, copies: dict[int, Any]) -> Any:
    """Return a copy of a plain *value*: of the same tensor or container the same one."""
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, Tensor):
        copies[id(value)] = value.detach().clone()
    elif type(value) is dict:
        copies[id(value)] = {name: _copy(one, copies) for name, one in value.items()}
    elif type(value) is deque:
        copies[id(value)] = deque((_copy(one, copies) for one in value), value.maxlen)
    elif type(value) in _SEQUENCES:
        copies[id(value)] = type(value)(_copy(one, copies) for one in value)
    return copies.get(id(value), value)
