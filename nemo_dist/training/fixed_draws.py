"""Let forwards in training draw the same whatever their shapes are, so that runs on unlike inputs can be compared.

Dropout keeps everything, noise is its mean, and a number between 0 and 1 is almost 1, so that nothing is left out by
its rate. What other generators than torch's draw, those of Python and numpy, starts anew in every run.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo_dist.torch_private import TorchDispatchMode

ELSEWHERE = "a generator of Python or numpy"
_LARGEST = 1 - 2.0**-20  # of numbers from 0 to 1, 1 left out


class FixedDraws(TorchDispatchMode):
    """Within the context, draws have values that depend on neither generator nor shape.

    ``unknown``: the operators that drew and have no such value, whose draws are left as they are, or ELSEWHERE.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.unknown: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in function.tags:
            return function(*args, **given)
        before = torch.get_rng_state()
        found = function(*args, **given)
        if not torch.equal(before, torch.get_rng_state()):  # attention without dropout draws nothing
            value = _value(function.overloadpacket.__name__, *args, **given)
            if value is None or not isinstance(found, Tensor):
                self.unknown.add(str(function))
            else:
                found.copy_(torch.as_tensor(value))
        return found


def _value(name: str, *args: Any, **kwargs: Any) -> Any:
    """Return what the draws of the operator *name* become, None where that is not known."""
    if name == "uniform_":
        low, high = _numbers(args[1:], kwargs, **{"from": 0.0, "to": 1.0})
        return low + (high - low) * _LARGEST
    if name == "normal_":
        return _numbers(args[1:], kwargs, mean=0.0)[0]
    if name == "normal":
        return args[0] if args else None  # a number, or a tensor of means
    return _CONSTANTS.get(name.removesuffix("_like"))


def _numbers(args: Any, kwargs: Any, **defaults: float) -> list[float]:
    names = list(defaults)
    given = dict(zip(names, args, strict=False))
    return [float({**defaults, **given, **kwargs}[name]) for name in names]


_CONSTANTS = {"bernoulli": 1.0, "bernoulli_": 1.0, "rand": _LARGEST, "randn": 0.0, "exponential_": 1.0}


@contextmanager
def unmoved_generators(draws: FixedDraws) -> Iterator[None]:
    """Put the generators of Python and numpy back at the end; ``draws.unknown`` has ELSEWHERE if code drew by them."""
    of_python, of_numpy = random.getstate(), np.random.get_state(legacy=False)
    try:
        yield
    finally:
        if random.getstate() != of_python or repr(np.random.get_state(legacy=False)) != repr(of_numpy):
            draws.unknown.add(ELSEWHERE)
        random.setstate(of_python)
        np.random.set_state(of_numpy)
