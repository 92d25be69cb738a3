"""Which chunks of a global tensor each rank holds, and how to assemble the chunks of one tensor on one rank.

A chunk is a part of the global tensor with an offset and a size per tensor dim, as in torch's distributed checkpoints.
Every layout consists of chunks: replicas hold the same one, a shard is one, and a strided shard (packed projections,
two mesh axes on one tensor dim) is several. So what is saved under one layout can be loaded under any other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise, product
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from nemo_dist.errors import PluginError
from nemo_dist.mesh.rank_group import RankGroup
from nemo_dist.plugin.mixed_precision import dtype_name
from nemo_dist.torch_private import StridedShard


@attrs.frozen
class Chunk:
    """A part of a global tensor: its offsets and sizes, one int per tensor dim."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.sizes)

    def of(self, whole: Tensor) -> Tensor:
        """Return this chunk of the tensor *whole*, as a view."""
        for dim, (start, size) in enumerate(zip(self.offsets, self.sizes, strict=True)):
            whole = whole.narrow(dim, start, size)
        return whole

    def within(self, other: Chunk) -> Chunk:
        """Return this chunk with offsets relative to those of *other*, which contains it."""
        return Chunk(tuple(mine - its for mine, its in zip(self.offsets, other.offsets, strict=True)), self.sizes)

    def common(self, other: Chunk) -> Chunk | None:
        """Return the intersection of this chunk and *other*, or None when it is empty."""
        corners = zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        spans = [(max(a, b), min(a + n, b + m)) for a, n, b, m in corners]
        if any(stop <= start for start, stop in spans):
            return None
        return Chunk(tuple(start for start, _ in spans), tuple(stop - start for start, stop in spans))


def chunks(tensor: Tensor) -> Iterator[tuple[Chunk, Tensor]]:
    """Yield the chunks of *tensor* that this rank holds, each with a view of its values; no communication."""
    if tensor.numel() == 0:
        return
    if not isinstance(tensor, DTensor):
        yield Chunk((0,) * tensor.dim(), tuple(tensor.shape)), tensor.detach()
        return
    local = tensor.to_local().detach()
    if local.numel() == 0:
        return
    runs = [_runs(tensor, local, dim) for dim in range(tensor.dim())]
    for chosen in product(*runs):
        chunk = Chunk(tuple(run[0] for run in chosen), tuple(run[2] for run in chosen))
        yield chunk, Chunk(tuple(run[1] for run in chosen), chunk.sizes).of(local)


def _runs(tensor: DTensor, local: Tensor, dim: int) -> tuple[tuple[int, int, int], ...]:
    """Return the runs of indices of *dim* that *local* holds: (global start, local start, length) each.

    Raises PluginError for a partial placement, and for a local tensor of another size than its placements give.
    """
    coordinates: Sequence[int] = tensor.device_mesh.get_coordinate() or ()
    splits = []
    for axis, (placement, coordinate) in enumerate(zip(tensor.placements, coordinates, strict=True)):
        if placement.is_partial():
            raise PluginError(f"a tensor of the state is {tensor.placements} on its mesh; reduce it before it is saved")
        if hasattr(placement, "dim") and placement.dim % tensor.dim() == dim:
            splits.append((getattr(placement, "split_factor", None), tensor.device_mesh.size(axis), coordinate))
    runs = _stretches(tensor.shape[dim], tuple(splits))
    held = sum(run[2] for run in runs)
    if held != local.shape[dim]:
        raise PluginError(
            f"a tensor of shape {tuple(tensor.shape)} as {tensor.placements} should have {held} of dim {dim} on "
            f"this rank, but has {local.shape[dim]}; export_state must bring it to the layout that it declares"
        )
    return runs


@lru_cache(maxsize=4096)
def _stretches(size: int, splits: tuple[tuple[int | None, int, int], ...]) -> tuple[tuple[int, int, int], ...]:
    """Return the runs of a dim of *size* that remain after *splits*.

    A run is as in ``_runs``; a split is (split factor or None, number of ranks, coordinate of this rank).
    """
    index = torch.arange(size)
    # Left to right, as DTensor does it. Only torch's private _split_tensor tells exactly how a placement splits.
    for factor, ranks, coordinate in splits:
        flat: Any = Shard(0) if factor is None else StridedShard(0, split_factor=factor)
        shards, _ = flat._split_tensor(index, ranks, with_padding=False)
        index = shards[coordinate]
    breaks = [0, *(torch.nonzero(index.diff() != 1).flatten() + 1).tolist(), len(index)]
    return tuple((int(index[a]), a, b - a) for a, b in pairwise(breaks) if b > a)


@attrs.frozen(kw_only=True)
class Entry:
    """The metadata of one tensor over all ranks: its global shape, its dtype, and the ranks that hold each chunk."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    holders: Mapping[Chunk, Sequence[int]]

    @property
    def nbytes(self) -> int:
        """The size of the whole tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def describe(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return, as JSON, shape, dtype and this rank's chunks of each tensor.

    Raises PluginError for a tensor whose local size is not that of its placements.
    """
    return {
        name: [
            list(tensor.shape),
            dtype_name(tensor.dtype),
            [[chunk.offsets, chunk.sizes] for chunk, _ in chunks(tensor)],
        ]
        for name, tensor in state.items()
    }


def merged(described: Sequence[Mapping[str, Any]]) -> dict[str, Entry]:
    """Merge the metadata of all ranks, as ``describe`` returned it on each.

    Raises PluginError when the chunks of a tensor leave holes or overlap, or ranks disagree about its shape or dtype.
    """
    found: dict[str, tuple[Any, str, dict[Chunk, list[int]]]] = {}
    for rank, theirs in enumerate(described):
        for name, (shape, dtype, parts) in theirs.items():
            known = found.setdefault(name, (shape, dtype, {}))
            if known[:2] != (shape, dtype):
                raise PluginError(f"{name} is {dtype} {shape} on rank {rank}, but {known[1]} {known[0]} on another")
            for offsets, sizes in parts:
                known[2].setdefault(Chunk(tuple(offsets), tuple(sizes)), []).append(rank)
    entries = {
        name: Entry(shape=tuple(shape), dtype=getattr(torch, dtype), holders=parts)
        for name, (shape, dtype, parts) in found.items()
    }
    _check_cover(entries)
    return entries


def _check_cover(entries: Mapping[str, Entry]) -> None:
    for name, entry in entries.items():
        held, wanted = sum(chunk.numel for chunk in entry.holders), math.prod(entry.shape)
        if held != wanted:
            what = "overlap" if held > wanted else "leave holes"
            raise PluginError(
                f"the pieces of {name} on all ranks {what}: {held} elements of {wanted}; export_state of a plugin must "
                "declare the layout that its tensors have"
            )


def assemble(
    ranks: RankGroup,
    wanted: Sequence[Iterable[str]],
    state: Mapping[str, Tensor],
    entries: Mapping[str, Entry],
    dtypes: Mapping[str, torch.dtype],
) -> dict[str, Tensor]:
    """Return the whole tensors ``wanted[ranks.rank]`` on the CPU, in *dtypes*; collective over *ranks*.

    ``wanted[r]`` are the names that rank r asks for, and is equal on every rank. One all-to-all moves the chunks for
    all ranks: each chunk is sent by one of its holders, by the receiver itself where it holds it.
    """
    outgoing: list[list[Tensor]] = [[] for _ in wanted]
    incoming: list[list[tuple[str, Chunk]]] = [[] for _ in wanted]
    held = {name: dict(chunks(state[name])) for names in wanted for name in names if name in state}
    for owner, names in enumerate(wanted):
        for name in names:
            for chunk, holders in entries[name].holders.items():
                sender = owner if owner in holders else holders[owner % len(holders)]
                if sender == ranks.rank:
                    outgoing[owner].append(as_bytes(held[name][chunk].to(dtypes[name])))
                if owner == ranks.rank:
                    incoming[sender].append((name, chunk))
    sizes = [sum(chunk.numel * dtypes[name].itemsize for name, chunk in parts) for parts in incoming]
    received = ranks.exchange(outgoing, sizes)
    whole = {name: torch.empty(entries[name].shape, dtype=dtypes[name]) for name in wanted[ranks.rank]}
    for buffer, parts in zip(received.split(sizes), incoming, strict=True):
        start = 0
        for name, chunk in parts:
            stop = start + chunk.numel * dtypes[name].itemsize
            chunk.of(whole[name]).copy_(buffer[start:stop].clone().view(dtypes[name]).view(chunk.sizes))
            start = stop
    return whole


def as_bytes(tensor: Tensor) -> Tensor:
    """Return the values of *tensor*, in row-major order, as a 1-D uint8 tensor; a view where *tensor* is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
