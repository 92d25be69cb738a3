"""Draw only this rank's slices of the initial weights: equal for every topology, at the cost of the shard.

How transformers initialises a model is recorded, as by :class:`~nemo_dist.loading.deferred_init.DeferredInit`, but
nothing is drawn meanwhile. A weight that is one draw (normal, uniform, truncated, constant), perhaps changed element by
element afterwards, is then drawn by index, from the seed and the name of the weight. What else a model does (an
orthogonal matrix, a copy of another weight) is repeated whole, from the same draws.
"""

from __future__ import annotations

import hashlib
import inspect
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from nemo_dist.loading.counted_draws import (
    Box,
    Constant,
    Distribution,
    Normal,
    TruncatedNormal,
    Uniform,
    draw,
    runs,
)
from nemo_dist.loading.deferred_init import Call, DeferredInit, covers_its_storage, run, view_of
from nemo_dist.mesh.dtensor import dim_of_difference, held_boxes, local, placed
from nemo_dist.torch_private import TorchDispatchMode, disable_current_modes, storage_id, tensors_in

_aten = torch.ops.aten
_MOST_SECONDS = 600.0
_SAMPLE = 1 << 20


def refuse_long_draws(build: Callable[[], object]) -> None:
    """Raise ValueError when to draw all weights of the model that *build* returns takes more than some minutes."""
    init = SliceInit(0)
    with torch.random.fork_rng([]), init:
        build()
    seconds = init.drawn * _seconds_per_draw()
    if seconds > _MOST_SECONDS:
        took = f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
        raise ValueError(
            f"init='whole' draws {init.drawn / 1e9:.1f} billion numbers on every rank, as one process would, which "
            f"takes this one some {took}; pass init='slices', with which a rank draws its own slices only"
        )


@lru_cache
def _seconds_per_draw() -> float:
    """Return what a draw takes here, measured once."""
    with torch.random.fork_rng([]):
        scratch = torch.empty(_SAMPLE)
        start = time.perf_counter()
        scratch.normal_()
        return (time.perf_counter() - start) / _SAMPLE


class SliceInit(DeferredInit):
    """Record how a model is initialised and draw by index: a context for building the model.

    ``drawn`` counts the elements that one process would have drawn.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed
        self.drawn = 0
        self._names: dict[int, str] = {}  # of storages

    def _advance(self, function: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Draw nothing."""
        self.drawn += args[0].numel() if isinstance(args[0], Tensor) else torch.Size(args[0]).numel()

    def hollow(self, model: nn.Module) -> None:
        """Record the initial tensor of every parameter and buffer by name, and put all parameters on meta."""
        super().hollow(model)
        for name, tensor in self._origin.items():
            if tensor.is_meta:
                self._names.setdefault(storage_id(tensor), name)

    def filled(self, name: str, parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
        """Return a parameter laid out like *parameter* with its initial values on *device*."""
        origin = self._origin.get(name)
        steps = None if origin is None or not origin.is_meta else self._by_element(origin)
        if steps is None or origin is None:
            return super().filled(name, parameter, device)
        own = torch.empty(local(parameter).shape, dtype=parameter.dtype)
        boxes, at = held_boxes(parameter), 0
        dim = dim_of_difference(boxes)
        for box in boxes:
            part = own
            if len(boxes) > 1:
                size = box[dim][1] - box[dim][0]
                part, at = own.narrow(dim, at, size), at + size
            for step in steps:
                step(part, box)
        return placed(parameter, own.to(device))

    def _by_element(self, origin: Tensor) -> list[Callable[[Tensor, Box], None]] | None:
        """Return the steps that make a box of *origin*, each as a function of the box's values and the box.

        None where an element does not depend on its index alone.
        """
        first, *others = self._history(storage_id(origin)) or [-1]
        distribution = None if first < 0 else _distribution(self._calls[first])
        if distribution is None or not _whole(origin):
            return None
        key, shape = self._key(first), tuple(origin.shape)
        steps: list[Callable[[Tensor, Box], None]] = [
            lambda part, box: draw(distribution, key, part, shape, box),
        ]
        for index in others:
            step = _element_step(self._calls[index], shape)
            if step is None:
                return None
            steps.append(step)
        return steps

    def _key(self, index: int) -> str:
        """Return the key of the draw of the recorded call *index*: the seed, the weight, and how often it was drawn."""
        storage = storage_id(_target(self._calls[index]))
        ordinal = self._writers[storage].index(index)
        return f"{self._seed}/{self._names.get(storage, f'call {index}')}/{ordinal}"

    def _repeat(self, index: int, storages: dict[int, Tensor]) -> None:
        """Run the recorded call *index* on the CPU tensors *storages*; what it draws depends on the seed and weight."""
        call = self._calls[index]
        distribution = _distribution(call)
        if distribution is not None:
            whole = view_of(storages, _target(call))
            draw(distribution, self._key(index), whole, whole.shape, [(0, size) for size in whole.shape])
            return
        if call.generator is not None:
            digest = hashlib.blake2b(self._key(index).encode(), digest_size=8).digest()
            torch.manual_seed(int.from_bytes(digest, "little") >> 1)
        run(call, storages)


def _target(call: Call) -> Tensor:
    """Return the tensor that *call* fills: its first argument, or what it made."""
    first = call.args[0]
    found: Tensor = first if isinstance(first, Tensor) else tensors_in(call.result)[0]
    return found


def _is_operator(function: Any) -> bool:
    return hasattr(function, "tags")


def _whole(tensor: Tensor) -> bool:
    """Whether the elements of *tensor* are those of its storage, in the same order."""
    return covers_its_storage(tensor) and tensor.is_contiguous()


def _distribution(call: Call) -> Distribution | None:
    """Return how *call* draws every element of a whole storage; None where it does something else."""
    name = getattr(call.function, "__name__", "")
    if not _whole(_target(call)):
        return None
    if name.endswith("trunc_normal_"):  # draws again and again, until all are within
        taken = inspect.signature(call.function).bind(*call.args, **call.kwargs)
        taken.apply_defaults()
        return TruncatedNormal(*(float(taken.arguments[what]) for what in ("mean", "std", "a", "b")))
    if _is_operator(call.function):
        return _of_operator(call.function, call.args[1:], call.kwargs)
    return _of_init_function(call)


def _of_init_function(call: Call) -> Distribution | None:
    """Return what a function of ``torch.nn.init`` draws, by the one operator that it calls; None if it calls others."""
    return _drawn(call.function, call.args[0].shape, tuple(call.args[1:]), tuple(call.kwargs.items()))


@lru_cache(maxsize=1024)  # most layers of a model draw the same
def _drawn(
    function: Any, shape: torch.Size, rest: tuple[Any, ...], named: tuple[tuple[str, Any], ...]
) -> Distribution | None:
    scratch = torch.empty(shape, device="meta")
    with disable_current_modes(), _Seen() as seen:
        function(scratch, *rest, **dict(named))
    if len(seen.calls) != 1:
        return None
    operator, args, kwargs = seen.calls[0]
    return _of_operator(operator, args[1:], kwargs) if args[0].shape == shape else None


class _Seen(TorchDispatchMode):
    """Records which operators a function of ``torch.nn.init`` calls on a meta tensor that change something."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Mapping[str, Any]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not function.is_view and function is not _aten.detach.default:
            self.calls.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


def _of_operator(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Distribution | None:
    """Return what the operator *function* draws with *args*, those after the first, and *kwargs*."""
    numbers = [float(arg) for arg in args if isinstance(arg, int | float)]
    numbers += [float(kwargs[name]) for name in ("mean", "std", "from", "to") if name in kwargs]
    if function is _aten.normal_.default:
        return Normal(*numbers)
    if function is _aten.uniform_.default:
        return Uniform(*numbers)
    if function in (_aten.zero_.default, _aten.zeros.default):
        return Constant(0.0)
    if function is _aten.ones.default:
        return Constant(1.0)
    if function in (_aten.fill_.Scalar, _aten.full.default):
        return Constant(float(args[0]))
    if function is _aten.fill_.Tensor and not args[0].is_meta:
        return Constant(float(args[0]))
    if function is _aten.randn.default:
        return Normal()
    return Uniform() if function is _aten.rand.default else None


def _element_step(call: Call, shape: tuple[int, ...]) -> Callable[[Tensor, Box], None] | None:
    """Return what *call* does to a box of a tensor of *shape*; None unless it changes each element by itself."""
    target, rest = call.args[0], call.args[1:]
    if not isinstance(target, Tensor) or not target.is_contiguous():
        return None
    if not covers_its_storage(target):
        constant = _constant(call)
        if constant is None:
            return None
        begin = int(target.storage_offset())
        end = begin + target.numel()
        return lambda part, box: _fill_range(part, box, shape, begin, end, constant)
    alone = not any(tensor.is_meta or tensor.dim() for tensor in tensors_in((rest, dict(call.kwargs))))
    function: Any = call.function
    in_place = _is_operator(function) and function.__name__.partition(".")[0].endswith("_")
    if not (alone and in_place and torch.Tag.pointwise in function.tags and call.generator is None):
        return None
    return lambda part, box: function(part, *rest, **call.kwargs)


def _constant(call: Call) -> float | None:
    """Return the value with which *call* fills its first argument; None where it does something else."""
    if _is_operator(call.function):
        found = _of_operator(call.function, call.args[1:], call.kwargs)
    else:
        found = _of_init_function(call)
    return found.value if isinstance(found, Constant) else None


def _fill_range(part: Tensor, box: Box, shape: tuple[int, ...], begin: int, end: int, value: float) -> None:
    """Fill the elements of *part*, a box of a tensor of *shape*, whose flat index is from *begin* up to *end*."""
    for place, start, count in runs(shape, box):
        low, high = max(begin - start, 0), min(end - start, count)
        if low < high:
            part[place].view(-1)[low:high] = value
