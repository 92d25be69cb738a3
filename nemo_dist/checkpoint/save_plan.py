"""Which rank writes what, computed by each rank alone from what all of them hold."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence

import attrs

from nemo_dist.checkpoint.holdings import Entry, Holding, entries_of
from nemo_dist.checkpoint.layout import Chunk, Spread
from nemo_dist.checkpoint.stored_tensor import Computed, Listed, Stored, StoredChunk, itemsize, key


@attrs.frozen
class Piece:
    """A ``chunk`` of the tensor ``name`` that this rank writes, its ``label`` in the file, and its place.

    The place is that in the ``local`` tensor; None where the rank listed its chunks and knows itself.
    """

    name: str
    label: str
    chunk: Chunk
    local: Chunk | None


@attrs.frozen
class Copy:
    """What this rank has of the tensor ``name`` as number ``replica`` of the ``count`` ranks that have the same.

    ``chunk``: the part; None is all that this rank has. ``label``: equal on those ranks only.
    """

    name: str
    label: str
    chunk: Chunk | None
    replica: int
    count: int


@attrs.frozen
class SavePlan:
    """Where every tensor of the checkpoint will be, and the ``pieces`` that this rank writes.

    ``replicated``: some ranks have the same parts of a tensor; ``copies`` are those of this rank.
    """

    tensors: Mapping[str, Stored]
    pieces: Sequence[Piece]
    replicated: bool = False
    copies: Sequence[Copy] = ()

    @classmethod
    def of(cls, holdings: Sequence[Holding], rank: int, even: bool = True) -> SavePlan:
        """Return the plan of *rank*; its ``tensors`` are equal on every rank.

        Of the ranks that hold a chunk, the one with the fewest bytes so far writes it. Without *even* it is the first,
        so that all chunks are of one replica, as replicas may differ. Raises PluginError as ``entries_of``.
        """
        share, tensors, entries = _Share(even), {}, entries_of(holdings)
        for name, entry in sorted(entries.items()):
            tensors[name] = Stored(entry.shape, entry.dtype, share.writer_of(entry))
        own = next((holding.tensors for holding in holdings if any(rank in ranks for ranks in holding.ranks)), {})
        pieces = []
        for name, held in own.items():
            local = {} if held.layout is None else dict(held.layout.chunks_of(held.shape, rank))
            pieces += [Piece(name, key(name, c), c, local.get(c)) for c in tensors[name].in_file(rank)]
        replicated = even and any(map(_is_replicated, entries.values()))
        copies = [copy for name in own for copy in _copies(name, entries[name], rank)] if replicated else []
        return cls(tensors, pieces, replicated, copies)


def _is_replicated(entry: Entry) -> bool:
    if entry.spread is not None:
        return entry.spread.replicas > 1
    return any(len(ranks) > 1 for ranks in entry.holders.values())


def _copies(name: str, entry: Entry, rank: int) -> Iterator[Copy]:
    """Yield what *rank* and others have of the tensor *name*."""
    spread = entry.spread
    if spread is not None:
        if spread.replicas > 1:
            first = [chunk.offsets for chunk, _ in spread.layout.chunks_of(entry.shape, rank)[:1]]
            yield Copy(name, f"{name} {first}", None, spread.replica_of(rank), spread.replicas)
        return
    for chunk, ranks in entry.holders.items():
        if len(ranks) > 1 and rank in ranks:
            yield Copy(name, f"{name} {chunk.offsets} {chunk.sizes}", chunk, list(ranks).index(rank), len(ranks))


@attrs.define
class _Share:
    """Shares out the writing: bytes so far of every replica of a layout, and of every rank with chunks of its own.

    Without ``even`` the first replica writes all.
    """

    even: bool = True
    replicas: dict[Spread, list[tuple[int, int]]] = attrs.field(factory=dict)
    ranks: dict[int, int] = attrs.field(factory=dict)

    def writer_of(self, entry: Entry) -> Computed | Listed:
        """Return who writes the chunks of *entry*: of replicas one writes all of it, each of its ranks its own part."""
        size, spread = itemsize(entry.dtype), entry.spread
        if spread is None:
            return Listed(
                [StoredChunk(chunk, self._writer(chunk, ranks, size)) for chunk, ranks in entry.holders.items()]
            )
        if spread.replicas == 1 or not self.even:
            return Computed(spread, 0)
        heap = self.replicas.setdefault(spread, [(0, replica) for replica in range(spread.replicas)])
        load, replica = heap[0]
        largest = sum(chunk.numel for chunk, _ in spread.layout.chunks_of(entry.shape, spread.first))
        heapq.heapreplace(heap, (load + largest * size, replica))
        return Computed(spread, replica)

    def _writer(self, chunk: Chunk, ranks: Sequence[int], size: int) -> int:
        writer = min(ranks, key=lambda rank: (self.ranks.get(rank, 0) if self.even else 0, rank))
        self.ranks[writer] = self.ranks.get(writer, 0) + chunk.numel * size
        return writer
