"""Let forwards in training draw the same whatever their shapes are, so that runs on unlike inputs can be compared.

Dropout keeps everything, noise is its mean, and a number between 0 and 1 is almost 1, so that nothing is left out by
its rate. What other generators than torch's draw, those of Python and numpy, starts anew in every run.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
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
def repeatable(draws: FixedDraws, training: bool) -> Iterator[None]:
    """Within the context run a forward that another run is compared with, and leave all generators as they were.

    In *training* torch draws what *draws* say, and ``draws.unknown`` tells what cannot be made equal.
    """
    with unmoved_generators(draws), draws if training else nullcontext():
        yield


@contextmanager
def unmoved_generators(draws: FixedDraws) -> Iterator[None]:
    """Put the generators of torch (CPU), Python and numpy back at the end.

    ``draws.unknown`` has ELSEWHERE if code drew by those of Python or numpy. Generators belong to the process: threads
    share one such context.
    """
    before, of_python, of_numpy = elsewhere(), random.getstate(), np.random.get_state(legacy=False)
    try:
        with torch.random.fork_rng([]):
            yield
    finally:
        if elsewhere() != before:
            draws.unknown.add(ELSEWHERE)
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def elsewhere() -> tuple[Any, str]:
    """Return what the generators of Python and numpy will draw, to be compared."""
    return random.getstate(), repr(np.random.get_state(legacy=False))
