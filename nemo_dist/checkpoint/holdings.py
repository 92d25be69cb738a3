"""What the ranks hold of the tensors of a state: each rank says its own in a few lines, equal on most of them.

A tensor is described by shape, dtype and layout; a tensor whose layout does not follow from a regular mesh, by the
chunks that this rank has. Ranks whose descriptions are equal make one holding, so mostly there is one, or one per stage
of a pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import attrs

from nemo_dist.checkpoint.layout import Chunk, Layout, Spread, whole_of
from nemo_dist.checkpoint.stored_tensor import cuts_from_json, cuts_to_json
from nemo_dist.errors import PluginError

_ODD = "export_state of a plugin must declare the layout that its tensors have"


@attrs.frozen
class Held:
    """What one rank holds of a tensor: ``layout``, or the ``chunks`` themselves where there is no regular layout."""

    shape: tuple[int, ...]
    dtype: str
    layout: Layout | None
    chunks: tuple[Chunk, ...] = ()

    def chunks_of(self, rank: int) -> tuple[Chunk, ...]:
        """Return the chunks of *rank*, which holds what this says."""
        return self.chunks if self.layout is None else tuple(c for c, _ in self.layout.chunks_of(self.shape, rank))


@attrs.frozen
class Holding:
    """What each of ``ranks`` holds, by the name of the tensor."""

    ranks: Sequence[range]
    tensors: Mapping[str, Held]


@attrs.frozen(slots=False)
class Entry:
    """A tensor over all ranks: its global shape, the name of its dtype, and who holds what, as ranks and ``Held``."""

    shape: tuple[int, ...]
    dtype: str
    held: Sequence[tuple[Sequence[range], Held]] = ()

    @cached_property
    def spread(self) -> Spread | None:
        """The layout and the ranks that hold it; None where the ranks have several layouts, or one without order."""
        (_, first), *others = self.held
        if first.layout is None or any(held.layout != first.layout for _, held in others):
            return None
        ranks = _joined([ranks for several, _ in self.held for ranks in several])
        spread = None if ranks is None else Spread(first.layout, ranks.start, ranks.stop)
        return spread if spread is not None and spread.fits else None

    @property
    def holders(self) -> Mapping[Chunk, Sequence[int]]:
        """Every chunk, and the ranks that hold it; made anew each time, as it grows with the ranks."""
        if self.spread is not None:
            return dict(self.spread.holders(self.shape))
        found: dict[Chunk, list[int]] = {}
        for several, held in self.held:
            for rank in [rank for ranks in several for rank in ranks]:
                for chunk in held.chunks_of(rank):
                    found.setdefault(chunk, []).append(rank)
        return found

    def check(self, name: str) -> None:
        """Raise PluginError when the chunks of the ranks leave holes or overlap."""
        if self.spread is not None:
            return
        held, wanted = sum(chunk.numel for chunk in self.holders), whole_of(self.shape).numel
        if held != wanted:
            what = "overlap" if held > wanted else "leave holes"
            raise PluginError(f"the pieces of {name} on all ranks {what}: {held} elements of {wanted}; {_ODD}")


def _joined(several: Sequence[range]) -> range | None:
    """Return the one range of consecutive numbers that *several* make up; None if they do not."""
    ordered = sorted(several, key=lambda ranks: ranks.start)
    start = stop = ordered[0].start
    for ranks in ordered:
        if ranks.start != stop or (len(ranks) > 1 and ranks.step != 1):
            return None
        stop = ranks.start + len(ranks)
    return range(start, stop)


def entries_of(holdings: Sequence[Holding]) -> dict[str, Entry]:
    """Return the tensors of all *holdings*, which come in the order of their first ranks.

    Raises PluginError when the chunks of a tensor leave holes or overlap, or ranks disagree about its shape or dtype.
    """
    found: dict[str, list[tuple[Sequence[range], Held]]] = {}
    for holding in holdings:
        for name, held in holding.tensors.items():
            found.setdefault(name, []).append((holding.ranks, held))
    return {name: _entry(name, several) for name, several in found.items()}


def _entry(name: str, several: Sequence[tuple[Sequence[range], Held]]) -> Entry:
    (_, first), *others = several
    for ranks, held in others:
        if (held.shape, held.dtype) != (first.shape, first.dtype):
            raise PluginError(
                f"{name} is {held.dtype} {list(held.shape)} on rank {ranks[0][0]}, but {first.dtype} "
                f"{list(first.shape)} on another"
            )
    entry = Entry(first.shape, first.dtype, several)
    entry.check(name)
    return entry


def to_json(tensors: Mapping[str, Held]) -> dict[str, Any]:
    """Return what one rank holds as JSON, equal on ranks that hold the same; layouts are listed once."""
    indices: dict[Layout, int] = {}
    listed = {
        name: [
            held.shape,
            held.dtype,
            [[chunk.offsets, chunk.sizes] for chunk in held.chunks]
            if held.layout is None
            else indices.setdefault(held.layout, len(indices)),
        ]
        for name, held in tensors.items()
    }
    return {"layouts": [cuts_to_json(layout) for layout in indices], "tensors": listed}


def from_json(value: Mapping[str, Any]) -> dict[str, Held]:
    """Return what ``to_json`` encoded."""
    layouts = [cuts_from_json(entry) for entry in value["layouts"]]
    return {name: _held(entry, layouts) for name, entry in value["tensors"].items()}


def _held(value: Any, layouts: Sequence[Layout]) -> Held:
    shape, dtype, where = value
    if isinstance(where, int):
        return Held(tuple(shape), dtype, layouts[where])
    return Held(tuple(shape), dtype, None, tuple(Chunk(tuple(offsets), tuple(sizes)) for offsets, sizes in where))
