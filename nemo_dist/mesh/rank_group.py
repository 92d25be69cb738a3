"""The ranks of one mesh as a group: what they tell each other while they save and load."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_dist.errors import CheckpointError
from nemo_dist.mesh.store_consensus import default_store, share

if TYPE_CHECKING:
    from nemo_dist.mesh.mesh_context import MeshContext

_PATIENCE = timedelta(minutes=30)  # the slowest disk may be much slower than the fastest


@attrs.frozen
class RankGroup:
    """The ranks of a mesh, in the order of ``ranks`` (None: all of the process group), and this rank's device.

    ``store`` is for a background thread, which needs a connection of its own.
    """

    ranks: tuple[int, ...] | None = None
    device: torch.device = attrs.field(factory=lambda: torch.device("cpu"))
    store: dist.Store | None = None

    @classmethod
    def of(cls, mesh: MeshContext) -> RankGroup:
        """Return the group of the ranks of *mesh*."""
        laid = None if mesh.device_mesh is None else tuple(mesh.device_mesh.mesh.flatten().tolist())
        return cls(None if laid is None or len(laid) == _world() else laid, mesh.device)

    def in_background(self) -> RankGroup:
        """Return this group for use in another thread."""
        return self if self.size == 1 else attrs.evolve(self, store=default_store().clone())  # type: ignore[attr-defined]

    @property
    def size(self) -> int:
        """The number of ranks."""
        return _world() if self.ranks is None else len(self.ranks)

    @property
    def rank(self) -> int:
        """The place of this rank among them."""
        mine = dist.get_rank() if dist.is_initialized() else 0
        return mine if self.ranks is None else self.ranks.index(mine)

    @property
    def first(self) -> bool:
        """Whether this rank does what only one may do."""
        return self.rank == 0

    @contextmanager
    def agreed(self, occasion: str) -> Iterator[None]:
        """Run the context on every rank; what it raises on one is raised on all, after all came to its end."""
        failure: BaseException | None = None
        try:
            yield
        except Exception as error:
            failure = _in_words(occasion, error)
        share(occasion, None, failure, self.ranks, _PATIENCE, self.store)

    def collect(self, occasion: str, value_of: Callable[[], Any]) -> list[Any]:
        """Call *value_of* on every rank; return all answers, small JSON values in rank order, through the store.

        What it raises on one rank is raised on all.
        """
        failure, value = None, None
        try:
            value = value_of()
        except Exception as error:
            failure = _in_words(occasion, error)
        return share(occasion, value, failure, self.ranks, _PATIENCE, self.store)

    def gather(self, value: Any) -> list[Any]:
        """Return what every rank passed, JSON values of any size in rank order; collective."""
        text = json.dumps(value)
        if self.size == 1:
            return [json.loads(text)]
        mine = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(self.device)
        lengths = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(mine)], device=self.device), group=_group(self.ranks))
        padded = torch.zeros(max(map(int, lengths)), dtype=torch.uint8, device=self.device)
        padded[: len(mine)] = mine
        gathered = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(gathered, padded, group=_group(self.ranks))
        return [
            json.loads(bytes(one[: int(length)].cpu().numpy())) for one, length in zip(gathered, lengths, strict=True)
        ]

    def exchange(self, outgoing: Sequence[Sequence[Tensor]], sizes: Sequence[int]) -> Tensor:
        """Send each rank its bytes, and return what all sent to this one, in rank order, on the CPU; collective.

        *sizes* are the numbers of bytes that each rank sends here.
        """
        parts = [part for parts in outgoing for part in parts]
        sent = torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)
        if self.size == 1:
            return sent.cpu()
        received = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device)
        lengths = [sum(len(part) for part in parts) for parts in outgoing]
        dist.all_to_all_single(received, sent.to(self.device), list(sizes), lengths, group=_group(self.ranks))
        return received.cpu()


def _in_words(occasion: str, error: Exception) -> Exception:
    """Return *error*, as a CheckpointError when a file system made it."""
    if not isinstance(error, OSError):
        return error
    failure = CheckpointError(f"{occasion} failed: {error}")
    failure.__cause__ = error
    return failure


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@lru_cache(maxsize=16)
def _group(ranks: tuple[int, ...] | None) -> dist.ProcessGroup | None:
    """Return the process group of *ranks*, made on first use by them alone; None for all."""
    return None if ranks is None else dist.new_group(list(ranks), use_local_synchronization=True)
