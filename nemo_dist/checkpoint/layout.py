"""How a tensor is cut over ranks, with integers only: which chunks a rank has, and which ranks have a part of it.

Every layout consists of chunks, parts of the whole tensor with an offset and a size per dim, as in torch's distributed
checkpoints: replicas hold the same chunk, a shard is one, and a strided shard (packed projections, two mesh axes on one
dim) is several. The layouts of DTensors follow from mesh and placements alone, so a rank knows what any of thousands of
others has without asking it. Ranks are numbered from 0 within the group that saves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from itertools import product
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from torch import Tensor

Spans = tuple[tuple[int, int], ...]  # stretches of the indices of one dim, ascending: (start, length) each
_WHOLE_DIM = 1 << 16  # what is kept of equal questions: layers have equal tensors


@attrs.frozen(cache_hash=True)
class Chunk:
    """A part of a global tensor: its offsets and sizes, one int per tensor dim."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.sizes)

    def of(self, whole: Tensor) -> Tensor:
        """Return this chunk of the tensor *whole*, as a view, or that tensor itself."""
        if whole.shape == self.sizes:
            return whole
        for dim, (start, size) in enumerate(zip(self.offsets, self.sizes, strict=True)):
            if size != whole.shape[dim]:
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


def whole_of(shape: Sequence[int]) -> Chunk:
    """Return the chunk that is all of a tensor of *shape*."""
    return Chunk((0,) * len(shape), tuple(shape))


@attrs.frozen(cache_hash=True)
class Cut:
    """One mesh axis that shards ``dim`` into ``parts``; its ranks are ``stride`` apart.

    As torch's ``Shard``, or with a ``factor`` above 1 as its ``_StridedShard``: the dim is first taken as that many
    pieces, each of which is cut on its own. Pieces and parts are as of ``torch.chunk``, so the last ones may be
    smaller, or empty.
    """

    dim: int
    parts: int
    stride: int = 1
    factor: int = 1

    def coordinate(self, rank: int) -> int:
        """Return the coordinate of *rank* on the axis."""
        return rank // self.stride % self.parts

    def shares(self, total: int) -> Iterator[tuple[int, int, int]]:
        """Yield (start, stop, share) of each piece of *total* elements: part i has those from ``start + i * share``."""
        piece = _share(total, self.factor)
        for start in range(0, total, piece):
            stop = min(total, start + piece)
            yield start, stop, _share(stop - start, self.parts)


def _share(total: int, parts: int) -> int:
    return max(1, -(-total // parts))


@attrs.frozen(cache_hash=True, slots=False)
class Layout:
    """The cuts of a tensor, in the order in which they are made; axes that replicate it cut nothing."""

    cuts: tuple[Cut, ...] = ()

    def chunks_of(self, shape: tuple[int, ...], rank: int) -> tuple[tuple[Chunk, Chunk], ...]:
        """Return the chunks that *rank* has of a tensor of *shape*, each in the tensor and in the rank's local one."""
        return chunks_at(shape, self.cuts, tuple(cut.coordinate(rank) for cut in self.cuts))

    def meeting(self, shape: tuple[int, ...], wanted: Chunk) -> Iterator[tuple[tuple[int, ...], Chunk]]:
        """Yield the chunks that have elements of *wanted*, each with the coordinates on all cuts of who has it."""
        if 0 in shape or 0 in wanted.sizes:
            return
        dims = [
            _meeting(size, self._of_dim.get(dim, ()), start, start + length)
            for dim, (size, start, length) in enumerate(zip(shape, wanted.offsets, wanted.sizes, strict=True))
        ]
        for chosen in product(*dims):
            by_dim = [coordinate for coordinates, _ in chosen for coordinate in coordinates]
            coordinates = tuple(by_dim[place] for place in self._places)
            for spans in product(*(spans for _, spans in chosen)):
                yield coordinates, Chunk(tuple(start for start, _ in spans), tuple(length for _, length in spans))

    @cached_property
    def _of_dim(self) -> dict[int, tuple[Cut, ...]]:
        return {dim: tuple(cut for cut in self.cuts if cut.dim == dim) for dim in {cut.dim for cut in self.cuts}}

    @cached_property
    def _places(self) -> list[int]:
        """The place of each cut among all, when they are sorted by dim."""
        by_dim = sorted(range(len(self.cuts)), key=lambda index: self.cuts[index].dim)
        return [by_dim.index(index) for index in range(len(self.cuts))]


@lru_cache(maxsize=_WHOLE_DIM)
def chunks_at(
    shape: tuple[int, ...], cuts: tuple[Cut, ...], coordinates: tuple[int, ...]
) -> tuple[tuple[Chunk, Chunk], ...]:
    """Return the chunks at *coordinates*, one per cut: each as a part of the tensor and of the local tensor there."""
    if 0 in shape:
        return ()
    runs = []
    for dim, size in enumerate(shape):
        spans: Spans = ((0, size),)
        for cut, coordinate in zip(cuts, coordinates, strict=True):
            spans = _part(spans, cut, coordinate) if cut.dim == dim else spans
        runs.append(_with_local_starts(spans))
    return tuple(
        (
            Chunk(tuple(start for start, _, _ in chosen), sizes := tuple(length for _, _, length in chosen)),
            Chunk(tuple(local for _, local, _ in chosen), sizes),
        )
        for chosen in product(*runs)
    )


def _with_local_starts(spans: Spans) -> list[tuple[int, int, int]]:
    found, before = [], 0
    for start, length in spans:
        found.append((start, before, length))
        before += length
    return found


def _part(spans: Spans, cut: Cut, coordinate: int) -> Spans:
    """Return what part *coordinate* of *cut* gets of the elements in *spans*."""
    total = sum(length for _, length in spans)
    found: list[tuple[int, int]] = []
    index, before = 0, 0  # the span at hand, and the number of elements before it
    for start, stop, share in cut.shares(total):
        at, end = start + coordinate * share, min(stop, start + (coordinate + 1) * share)
        while at < end:
            while before + spans[index][1] <= at:
                before += spans[index][1]
                index += 1
            first = spans[index][0] + at - before
            length = min(end - at, spans[index][0] + spans[index][1] - first)
            if found and sum(found[-1]) == first:
                found[-1] = (found[-1][0], found[-1][1] + length)
            else:
                found.append((first, length))
            at += length
    return tuple(found)


@lru_cache(maxsize=_WHOLE_DIM)
def _meeting(size: int, cuts: tuple[Cut, ...], start: int, stop: int) -> tuple[tuple[tuple[int, ...], Spans], ...]:
    """Return the coordinates on *cuts*, all of one dim, that have indices in [start, stop), and their spans there."""
    found: list[tuple[tuple[int, ...], Spans]] = [((), ((0, size),))]
    for cut in cuts:
        found = [
            ((*coordinates, coordinate), _part(spans, cut, coordinate))
            for coordinates, spans in found
            for coordinate in _parts_meeting(spans, cut, start, stop)
        ]
    return tuple(
        (coordinates, tuple(span for span in spans if span[0] < stop and start < sum(span)))
        for coordinates, spans in found
    )


def _parts_meeting(spans: Spans, cut: Cut, start: int, stop: int) -> list[int]:
    """Return the coordinates on *cut* of the parts of *spans* that have indices in [start, stop)."""
    total, before = sum(length for _, length in spans), 0
    found: set[int] = set()
    wanted = []  # the places of those indices, counted within spans
    for first, length in spans:
        a, b = max(first, start), min(first + length, stop)
        if a < b:
            wanted.append((before + a - first, before + b - first))
        before += length
    pieces = list(cut.shares(total))
    piece = _share(total, cut.factor)
    for a, b in wanted:
        for begin, end, share in pieces[a // piece : (b - 1) // piece + 1]:
            found.update(range((max(a, begin) - begin) // share, (min(b, end) - 1 - begin) // share + 1))
    return sorted(found)


@attrs.frozen(cache_hash=True, slots=False)
class Spread:
    """A layout on the ranks from ``first`` to ``stop - 1``, each chunk on equally many of them: its replicas."""

    layout: Layout
    first: int
    stop: int

    @property
    def fits(self) -> bool:
        """Whether the ranks are whole meshes, so that every chunk is on one of them and replicas can be counted."""
        block = 1
        for cut in self._ascending:
            if cut.stride % block:
                return False
            block = cut.stride * cut.parts
        return 0 <= self.first < self.stop and self.first % block == 0 and (self.stop - self.first) % block == 0

    @cached_property
    def replicas(self) -> int:
        """How many ranks have each chunk."""
        return (self.stop - self.first) // math.prod(cut.parts for cut in self.layout.cuts)

    def replica_of(self, rank: int) -> int:
        """Return which of the ranks with the same chunks *rank* is, from 0."""
        place = rank - self.first
        for cut in reversed(self._ascending):
            place = place // (cut.stride * cut.parts) * cut.stride + place % cut.stride
        return place

    def rank_at(self, coordinates: Sequence[int], replica: int) -> int:
        """Return the rank at *coordinates*, one per cut, that is number *replica* of those with the same chunks."""
        place = replica
        known = dict(zip(self.layout.cuts, coordinates, strict=True))
        for cut in self._ascending:
            high, low = divmod(place, cut.stride)
            place = (high * cut.parts + known[cut]) * cut.stride + low
        return self.first + place

    def holders(self, shape: tuple[int, ...]) -> Iterator[tuple[Chunk, list[int]]]:
        """Yield every chunk of a tensor of *shape* and the ranks that have it, ascending."""
        for coordinates, chunk in self.layout.meeting(shape, whole_of(shape)):
            yield chunk, [self.rank_at(coordinates, replica) for replica in range(self.replicas)]

    @cached_property
    def _ascending(self) -> list[Cut]:
        return sorted(self.layout.cuts, key=lambda cut: cut.stride)
