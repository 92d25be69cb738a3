"""A process group for several ranks on one card: gloo, with CUDA tensors copied to the host and back.

Gloo itself takes CUDA tensors only in an all-reduce and a broadcast, and NCCL takes one rank per card. This is slow and
exact, and its only purpose is to run the kernels of every axis on a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Work, _create_work_from_future
from torch.futures import Future

NAME = "staged"
_OPERATIONS = (
    "allreduce",
    "allreduce_coalesced",
    "allgather",
    *("_allgather_base", "all_gather_single"),  # the old name, and that of torch 2.12 and later
    *("allgather_into_tensor_coalesced", "all_gather_single_coalesced"),
    "broadcast",
    "scatter",
    "gather",
    "reduce_scatter",
    *("_reduce_scatter_base", "reduce_scatter_single"),
    *("reduce_scatter_tensor_coalesced", "reduce_scatter_single_coalesced"),
    *("alltoall_base", "all_to_all_single"),
    "alltoall",
    "send",
    "recv",
    "barrier",
)


class Staged(dist.ProcessGroup):
    """A group of gloo whose operations take CUDA tensors; each but send and receive is complete when it returns."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._gloo: Any = dist.ProcessGroup(store, rank, size)
        backend = dist.ProcessGroupGloo(store, rank, size, timeout)
        self._gloo._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)

    def getBackendName(self) -> str:
        """Return the name."""
        return NAME

    @property
    def pg_name(self) -> str:
        """The name that torch gave to the group."""
        return str(dist.distributed_c10d._world.pg_names[self])

    @property
    def group_name(self) -> str:
        """The name that functional collectives find the group by."""
        return self.pg_name


class _Pending(Work):
    """Gloo's operation and, when it is waited for, the copies back to the device."""

    def __init__(self, work: Any, copies: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self._work, self._copies = work, copies

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait for it."""
        self._work.wait()
        for there, here in reversed(self._copies):  # outputs last: an input may lie in the same memory
            there.detach().copy_(here)
        return True


def _operation(name: str) -> Callable[..., Any]:
    def run(self: Staged, *args: Any) -> Any:
        copies: list[tuple[Tensor, Tensor]] = []

        def on_host(value: Any) -> Any:
            if isinstance(value, Tensor) and value.device.type != "cpu":
                copies.append((value, value.detach().cpu()))
                return copies[-1][1]
            return [on_host(one) for one in value] if isinstance(value, list | tuple) else value

        work = getattr(self._gloo, name)(*(on_host(arg) for arg in args))
        if name in ("send", "recv"):
            return _Pending(work, copies if name == "recv" else [])
        _Pending(work, copies).wait()
        done: Future[Any] = Future()
        done.set_result(list(_tensors(args[:1])))
        return _create_work_from_future(done)

    return run


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


for _name in _OPERATIONS:
    setattr(Staged, _name, _operation(_name))


def register() -> None:
    """Make ``init_process_group("staged")`` known."""
    dist.Backend.register_backend(NAME, Staged, devices=["cpu", "cuda"])
