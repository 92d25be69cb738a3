"""Count what a step does, operator by operator, on tensors without storage: FLOPs, bytes moved, sent and held.

Nothing is kept by hand: torch's own formulas count the FLOPs, sizes of tensors the bytes, and a tensor is held as long
as autograd, or activation checkpointing, holds it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import attrs
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import flop_registry

from nemo_dist.torch_private import (
    FLASH_ATTENTION,
    FUNCTIONAL_COLLECTIVES,
    TorchDispatchMode,
    fake_tensors,
    group_named,
    storage_id,
    tensors_in,
)


def _aten(name: str) -> Any:
    return getattr(torch.ops.aten, name)


_SCALAR, _ANY, _SORTS = _aten("_local_scalar_dense"), _aten("any"), (_aten("sort"), _aten("argsort"))
_GROUPED = _aten("_grouped_mm")
_FLASH, _FLASH_BACK = FLASH_ATTENTION


def _grouped(a: Tensor, b: Tensor, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """Return the FLOPs of matrix products by group: each row of the one meets the matrix of one group."""
    return 2 * a.shape[-2] * a.shape[-1] * b.shape[-1]


def _grouped_shape(a: Tensor, b: Tensor, offs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return the result of matrix products by group without values, of any dtype; torch's rule is for bfloat16 only."""
    shape = (a.shape[0], b.shape[-1]) if b.dim() == 3 else (len(offs), a.shape[0], b.shape[-1])
    return a.new_empty(shape)


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return int(flop_registry[_aten(_FLASH)](query, key, value, out_val=out_val))


def _attention_back(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any, out_val: Any = None, **more: Any) -> int:
    return int(flop_registry[_aten(_FLASH_BACK)](grad, q, k, v, out_val=out_val))


# The operators by which torch computes on a CPU what others do on a GPU, and one without a formula in torch.
_MORE: Mapping[Any, Callable[..., int]] = {
    _GROUPED: _grouped,
    _aten(f"{_FLASH}_for_cpu"): _attention,
    _aten(f"{_FLASH}_for_cpu_backward"): _attention_back,
}


@contextmanager
def without_storage() -> Iterator[None]:
    """Make tensors on the CPU without storage, with which a model does what it does with real ones.

    For fake tensors transformers makes every mask, as a graph for any batch needs it; a run without padding makes none.
    """
    fake = patch("transformers.utils.import_utils.is_fake_tensor", lambda tensor: False)
    with fake, fake_tensors(), torch.device("cpu"):
        yield


@attrs.define(kw_only=True)
class Counts:
    """What was counted: FLOPs, bytes that operators other than matrix products read and write, and bytes sent.

    ``sent`` and ``collectives`` are by process group; ``held`` are the bytes of tensors that were made and still exist.
    """

    flops: int = 0
    moved: int = 0
    sent: Counter[str] = attrs.field(factory=Counter)
    collectives: Counter[str] = attrs.field(factory=Counter)
    held: int = 0

    def copy(self) -> Counts:
        """Return the counts as they are now."""
        return attrs.evolve(self, sent=Counter(self.sent), collectives=Counter(self.collectives))

    def __sub__(self, other: Counts) -> Counts:
        return Counts(
            flops=self.flops - other.flops,
            moved=self.moved - other.moved,
            sent=Counter({key: value - other.sent[key] for key, value in self.sent.items()}),
            collectives=Counter({key: value - other.collectives[key] for key, value in self.collectives.items()}),
            held=self.held - other.held,
        )

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            flops=self.flops + other.flops,
            moved=self.moved + other.moved,
            sent=self.sent + other.sent,
            collectives=self.collectives + other.collectives,
            held=self.held + other.held,
        )


class OperatorCounter(TorchDispatchMode):
    """Counts operators while the mode is on; *known* are tensors that do not count as held, as parameters.

    What the host reads from tensors without storage is what a batch without padding has, whose tokens are routed
    evenly: each of *experts* ranks gets as many.
    """

    def __init__(self, known: list[Tensor], experts: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts = Counts()
        self.peak = 0
        self._known = {storage_id(tensor) for tensor in known}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._experts = experts
        self._slots = 0
        self._exceptions: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes back with the operators on its local tensors
        if function.overloadpacket is _SCALAR:
            return self._number(args[0])
        grouped = function.overloadpacket is _GROUPED and args[0].dim() == 2
        found = _grouped_shape(*args, **(kwargs or {})) if grouped else function(*args, **(kwargs or {}))
        self._count(function, args, kwargs or {}, found)
        return found

    def _number(self, tensor: Tensor) -> int | bool:
        """Return what the host reads: there is no exception (any), the rule holds (all), tokens have even shares."""
        if tensor.dtype == torch.bool:
            return storage_id(tensor) not in self._exceptions
        return self._slots // self._experts

    def _count(self, function: Any, args: Any, kwargs: Mapping[str, Any], found: Any) -> None:
        given, made = tensors_in((args, kwargs)), tensors_in(found)
        packet = getattr(function, "overloadpacket", function)
        if packet in _SORTS and given[0].dim() == 1:
            self._slots = given[0].numel()
        if packet is _ANY:
            self._exceptions |= {storage_id(one) for one in made}
        formula = flop_registry.get(packet) or _MORE.get(packet)
        if function.namespace in ("c10d", FUNCTIONAL_COLLECTIVES):
            self._send(function, args)
        elif formula is not None:
            self.counts.flops += int(formula(*args, **kwargs, out_val=found))
        elif not _is_view(function, given, made):
            self.counts.moved += sum(one.nbytes for one in (*given, *made))
        self._hold(made)

    def _send(self, function: Any, args: Any) -> None:
        """Add the bytes that this rank sends, with ring or pairwise algorithms, of a collective."""
        name = str(function).split(".")[1]
        boxed = [arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg)]
        named = [arg for arg in args if isinstance(arg, str)]
        if not boxed and not named:
            return  # a wait
        group: Any = dist.ProcessGroup.unbox(boxed[0]) if boxed else group_named(named[-1])
        ranks, sizes = group.size(), [tensor.nbytes for tensor in tensors_in(args)]
        whole = max(sizes) * (ranks if "gather" in name and len(sizes) == 1 else 1)
        twice = 2 if "allreduce" in name or "all_reduce" in name else 1
        self.counts.sent[group.group_name] += twice * whole * (ranks - 1) // ranks
        self.counts.collectives[group.group_name] += 1

    def _hold(self, made: list[Tensor]) -> None:
        for tensor in made:
            key = storage_id(tensor)
            if key not in self._known:
                storage = tensor.untyped_storage()
                self._alive[key] = StorageWeakRef(storage), storage.nbytes()
        self.sweep()

    def sweep(self) -> None:
        """Forget tensors that are gone, and note the bytes of the others."""
        gone = [key for key, (storage, _) in self._alive.items() if storage.expired()]
        for key in gone:
            del self._alive[key]
        self.counts.held = sum(size for _, size in self._alive.values())
        self.peak = max(self.peak, self.counts.held)


def _is_view(function: Any, given: list[Tensor], made: list[Tensor]) -> bool:
    """Whether an operator only makes views; one that writes in place ends with an underscore."""
    in_place = str(function).split(".")[1].endswith("_")
    return not in_place and not {storage_id(one) for one in made}.isdisjoint({storage_id(one) for one in given})
