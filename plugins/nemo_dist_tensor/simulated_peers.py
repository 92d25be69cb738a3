"""Ranks that are threads of one process, with the collectives that tensor-parallel forwards call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import attrs
import torch
from torch import Tensor

from nemo_dist_tensor.collectives import Peers

_WAIT = 60.0  # seconds, for the others at a collective

R = TypeVar("R")


@attrs.define(eq=False)
class Exchange:
    """What the simulated ranks share: a place for the tensor of each, and a barrier."""

    size: int
    barrier: threading.Barrier
    slots: list[Any]

    def all(self, rank: int, value: Tensor) -> list[Tensor]:
        """Return the *value* of every rank."""
        self.slots[rank] = value
        self.barrier.wait(_WAIT)
        found = list(self.slots)
        self.barrier.wait(_WAIT)
        return found


@attrs.frozen(eq=False)
class SimulatedPeers(Peers):
    """Peers that are threads of this process."""

    exchange: Exchange

    @classmethod
    def make(cls, size: int) -> list[SimulatedPeers]:
        """Return *size* peers of one another."""
        exchange = Exchange(size, threading.Barrier(size), [None] * size)
        nothing: Any = None  # there is no mesh and no process group
        return [cls(nothing, nothing, size, rank, exchange) for rank in range(size)]

    def all_reduce(self, value: Tensor, operation: str = "sum") -> Tensor:
        """Return the sum (or "max") over the peers."""
        values = torch.stack(self.exchange.all(self.rank, value.detach().contiguous()))
        return values.sum(0) if operation == "sum" else values.max(0).values

    def all_gather(self, piece: Tensor, dim: int, total: int) -> Tensor:
        """Return the pieces of all peers joined along *dim*."""
        return torch.cat(self.exchange.all(self.rank, piece.detach()), dim).contiguous()

    def reduce_scatter(self, value: Tensor, dim: int) -> Tensor:
        """Return this rank's piece of the sum over the peers."""
        return self.piece(self.all_reduce(value), dim)


def together(work: Sequence[Callable[[], R]], exchange: Exchange) -> list[R]:
    """Run the *work* of every rank in a thread of its own, and return the results; raise the first rank's own error."""
    results: list[Any] = [None] * len(work)

    def run(rank: int) -> None:
        try:
            results[rank] = work[rank]()
        except Exception as error:
            results[rank] = error
            exchange.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = [result for result in results if isinstance(result, Exception)]
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return results
