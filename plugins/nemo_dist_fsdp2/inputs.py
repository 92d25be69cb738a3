"""Cast what a forward computes on to the dtype of its parameters, and not what it compares or counts with.

``fully_shard`` casts every floating tensor. Labels then lose digits, and a mask of the least float32 becomes minus
infinity in bfloat16. A model in bfloat16 on one process gets both as they are.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# In the names of what stays as it is given: masks, positions, rotary tables, and what only a loss reads.
_KEPT = ("mask", "label", "weight", "position", "loss")


def cast_inputs(module: nn.Module, dtype: torch.dtype | None) -> None:
    """From now on cast the floating tensors that *module* is given, also in containers, to *dtype* (None: not).

    Arguments, and values of dicts among them, with one of the names above stay as they are.
    """
    _cast_before(module, dtype, lambda name, _: not _kept(name))


def cast_hidden_states(module: nn.Module, dtype: torch.dtype | None) -> None:
    """The same for a *module* inside of a model: its first argument, and others that are hidden states by name."""
    _cast_before(module, dtype, lambda name, index: not _kept(name) and (index == 0 or "hidden_states" in name))


def _cast_before(module: nn.Module, dtype: torch.dtype | None, chosen: Callable[[str, int], bool]) -> None:
    if dtype is not None:
        names = list(inspect.signature(module.forward).parameters)
        module.register_forward_pre_hook(partial(_cast, names, chosen, dtype), with_kwargs=True)


def _cast(
    names: list[str], chosen: Callable[[str, int], bool], dtype: torch.dtype, _: nn.Module, args: Any, kwargs: Any
) -> Any:
    def given(name: str, index: int, value: Any) -> Any:
        return _computed_in(dtype, value) if chosen(name, index) else value

    named = [*names, *[""] * len(args)]
    own = tuple(given(name, index, value) for index, (name, value) in enumerate(zip(named, args, strict=False)))
    places = {name: index for index, name in enumerate(names)}
    return own, {name: given(name, places.get(name, -1), value) for name, value in kwargs.items()}


def _kept(name: Any) -> bool:
    return isinstance(name, str) and any(part in name for part in _KEPT)


def _computed_in(dtype: torch.dtype, value: Any) -> Any:
    """Return *value* with the floating tensors in it in *dtype*; a container without any is the same one."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        made = {name: one if _kept(name) else _computed_in(dtype, one) for name, one in value.items()}
        changed = {name: one for name, one in made.items() if one is not value[name]}
        return _with(value, changed) if changed else value
    if isinstance(value, list | tuple):
        items = [_computed_in(dtype, one) for one in value]
        if all(one is other for one, other in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _with(values: Any, changed: dict[Any, Any]) -> Any:
    """Return a copy of the dict, or output of a model, *values* with *changed* in it."""
    found = copy.copy(values)
    for name, one in changed.items():
        found[name] = one
    return found
