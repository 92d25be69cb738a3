"""Where the chunks of a tensor of a checkpoint are: computed from its layout, or listed where it has no regular one."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs

from nemo_dist.checkpoint.layout import Chunk, Cut, Layout, Spread, whole_of

_MOST_PIECES = 1 << 16  # of a strided cut; a manifest that was made to stop a load could name any number


@attrs.frozen
class StoredChunk:
    """A chunk of a tensor, and the index in the manifest of the file that contains it."""

    chunk: Chunk
    file: int


def key(name: str, chunk: Chunk) -> str:
    """Return the name under which a chunk of the tensor *name* is stored: ``model/lm_head.weight[0:48,0:32]``."""
    spans = [f"{start}:{start + size}" for start, size in zip(chunk.offsets, chunk.sizes, strict=True)]
    return f"{name}[{','.join(spans)}]"


@attrs.frozen
class Computed:
    """Chunks that follow from the layout: rank number ``replica`` of those that have a chunk wrote it into its file."""

    spread: Spread
    replica: int

    def meeting(self, shape: tuple[int, ...], wanted: Chunk) -> Iterator[StoredChunk]:
        """Yield the chunks that have elements of *wanted*."""
        for coordinates, chunk in self.spread.layout.meeting(shape, wanted):
            yield StoredChunk(chunk, self.spread.rank_at(coordinates, self.replica))

    def in_file(self, shape: tuple[int, ...], file: int) -> Iterator[Chunk]:
        """Yield the chunks that are in the file with the index *file*."""
        spread = self.spread
        if spread.first <= file < spread.stop and spread.replica_of(file) == self.replica:
            for chunk, _ in spread.layout.chunks_of(shape, file):
                yield chunk

    def check(self, name: str, shape: tuple[int, ...], files: int) -> None:
        """Raise ValueError unless the chunks make a tensor of *shape* and lie in *files* files."""
        spread, cuts = self.spread, self.spread.layout.cuts
        axes_fit = all(cut.dim < len(shape) and cut.parts and cut.stride and cut.factor for cut in cuts)
        if not axes_fit or not spread.fits or spread.stop > files or self.replica >= spread.replicas:
            raise ValueError(f"a piece of {name} lies outside the tensor or the files")
        if math.prod(cut.factor for cut in cuts) > _MOST_PIECES:
            raise ValueError(f"{name} is cut into more pieces than any tensor is")


@attrs.frozen
class Listed:
    """Chunks that are listed one by one."""

    pieces: Sequence[StoredChunk]

    def meeting(self, shape: tuple[int, ...], wanted: Chunk) -> Iterator[StoredChunk]:
        """Yield the chunks that have elements of *wanted*, a part of a tensor of *shape*."""
        return (piece for piece in self.pieces if piece.chunk.common(wanted) is not None)

    def in_file(self, shape: tuple[int, ...], file: int) -> Iterator[Chunk]:
        """Yield the chunks, of a tensor of *shape*, that are in the file with the index *file*."""
        return (piece.chunk for piece in self.pieces if piece.file == file)

    def check(self, name: str, shape: tuple[int, ...], files: int) -> None:
        """Raise ValueError unless the chunks make a tensor of *shape* and lie in *files* files."""
        whole = whole_of(shape)
        for piece in self.pieces:
            if not 0 <= piece.file < files or piece.chunk.common(whole) != piece.chunk:
                raise ValueError(f"a piece of {name} lies outside the tensor or the files")
        if sum(piece.chunk.numel for piece in self.pieces) != whole.numel or overlap(self.pieces):
            raise ValueError(f"the pieces of {name} do not make the whole tensor")


@attrs.frozen
class Stored:
    """A tensor of a checkpoint: its shape, the name of its dtype, and where its chunks are."""

    shape: tuple[int, ...]
    dtype: str
    where: Computed | Listed

    def meeting(self, wanted: Chunk) -> Iterator[StoredChunk]:
        """Yield the stored chunks that have elements of *wanted*."""
        return self.where.meeting(self.shape, wanted)

    def in_file(self, file: int) -> Iterator[Chunk]:
        """Yield the chunks that are in the file with the index *file*."""
        return self.where.in_file(self.shape, file)


def itemsize(dtype: str) -> int:
    """Return the bytes of an element of the dtype of this name: 2 for ``bfloat16``."""
    bits = re.search(r"[0-9]+", dtype)
    return int(bits[0]) // 8 if bits else 1


def to_json(tensors: Mapping[str, Stored]) -> dict[str, Any]:
    """Return *tensors* as JSON: each with the index of its layout, as many have the same, or with a list of chunks."""
    indices: dict[Spread, int] = {}
    listed: dict[str, Any] = {}
    for name, stored in tensors.items():
        where: list[Any]
        if isinstance(stored.where, Computed):
            where = [indices.setdefault(stored.where.spread, len(indices)), stored.where.replica]
        else:
            where = [[[piece.file, piece.chunk.offsets, piece.chunk.sizes] for piece in stored.where.pieces]]
        listed[name] = [stored.shape, stored.dtype, *where]
    layouts = [{"ranks": [spread.first, spread.stop], **cuts_to_json(spread.layout)} for spread in indices]
    return {"layouts": layouts, "tensors": listed}


def from_json(layouts: Sequence[Any], tensors: Mapping[str, Any]) -> dict[str, Stored]:
    """Return what ``to_json`` encoded; raise an error of some kind for junk, ValueError for what cannot be."""
    spreads = [Spread(cuts_from_json(entry), *whole_numbers(entry["ranks"])) for entry in layouts]
    return {name: _stored(value, spreads) for name, value in tensors.items()}


def _stored(value: Any, spreads: Sequence[Spread]) -> Stored:
    shape, dtype, where, *replica = value
    place: Computed | Listed
    if replica:
        index, chosen = whole_numbers([where, *replica])
        place = Computed(spreads[index], chosen)
    else:
        place = Listed([_piece(*one) for one in where])
    return Stored(whole_numbers(shape), str(dtype), place)


def _piece(file: Any, offsets: Any, sizes: Any) -> StoredChunk:
    return StoredChunk(Chunk(whole_numbers(offsets), whole_numbers(sizes)), *whole_numbers([file]))


def cuts_to_json(layout: Layout) -> dict[str, Any]:
    """Return *layout* as JSON: size and stride of each mesh axis that cuts, and its dim, with a factor if strided."""
    return {
        "mesh": [[cut.parts, cut.stride] for cut in layout.cuts],
        "placements": [[cut.dim] if cut.factor == 1 else [cut.dim, cut.factor] for cut in layout.cuts],
    }


def cuts_from_json(value: Mapping[str, Any]) -> Layout:
    """Return what ``cuts_to_json`` encoded; raise an error of some kind for junk."""
    cuts = []
    for axis, placement in zip(value["mesh"], value["placements"], strict=True):
        (parts, stride), (dim, *factor) = whole_numbers(axis), whole_numbers(placement)
        cuts.append(Cut(dim, parts, stride, *factor))
    return Layout(tuple(cuts))


def whole_numbers(values: Any) -> tuple[int, ...]:
    """Return *values*, a list, as a tuple; raise ValueError unless all are integers from 0."""
    if not isinstance(values, list) or not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"{values!r:.60} is no list of whole numbers")
    return tuple(values)


def overlap(pieces: Sequence[StoredChunk]) -> bool:
    """Whether two of *pieces* of one tensor have an element in common.

    A sweep along the first dim, in which most tensors are cut: only pieces with common rows are compared.
    """
    if not pieces or not pieces[0].chunk.sizes:
        return len(pieces) > 1
    open_chunks: list[Chunk] = []
    for piece in sorted(pieces, key=lambda piece: piece.chunk.offsets[0]):
        start = piece.chunk.offsets[0]
        open_chunks = [chunk for chunk in open_chunks if chunk.offsets[0] + chunk.sizes[0] > start]
        if any(chunk.common(piece.chunk) is not None for chunk in open_chunks):
            return True
        open_chunks.append(piece.chunk)
    return False
