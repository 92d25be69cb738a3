"""Find parameters that a loss of the user's own trains beside the model, whose gradients no strategy averages."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from functools import partial
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from nemo_dist.hf_model import is_own_class
from nemo_dist.training.peft_adapters import NOT_AVERAGED, is_averaged


def refuse_trained(loss: Any, at_hand: Iterable[tuple[str, Tensor]]) -> None:
    """Raise ValueError where a backward gave gradients to tensors that *loss* has *at_hand*; see ``tensors_at_hand``.

    Those of a model that was loaded for a setup are averaged by its strategy.
    """
    found = [name for name, one in at_hand if one.is_leaf and one.grad is not None and not is_averaged(one)]
    if found:
        name = getattr(loss, "__qualname__", type(loss).__qualname__)
        raise ValueError(
            f"the loss {name} trains parameters of its own ({', '.join(found[:3])}), {NOT_AVERAGED}; if they are not "
            "to be trained, freeze them"
        )


def tensors_at_hand(loss: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield what the callable *loss* can read besides its arguments, tensors and parameters of modules, by name.

    Models that were loaded for a setup are left out.
    """
    seen: set[int] = set()
    waiting: list[tuple[str, Any]] = [("", loss)]
    while waiting:
        name, value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            if not hasattr(value, "distributed_setup"):
                yield from ((f"{name}.{own}".removeprefix("."), one) for own, one in value.named_parameters())
        elif isinstance(value, Tensor):
            yield name, value
        elif value is loss or (isinstance(value, FunctionType | partial) and is_own_class(value)):
            waiting += _values_at_hand(value)


def _values_at_hand(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, partial):
        return [("", value.func), *((str(index), one) for index, one in enumerate(value.args)), *value.keywords.items()]
    if inspect.ismethod(value):
        owner = value.__self__
        return [("", owner), *_values_at_hand(value.__func__), *getattr(owner, "__dict__", {}).items()]
    if not isinstance(value, FunctionType):
        return list(getattr(value, "__dict__", {}).items())
    try:
        read = inspect.getclosurevars(value)
    except ValueError:  # a name of the function around it has no value yet
        return []
    return [*read.nonlocals.items(), *read.globals.items()]
