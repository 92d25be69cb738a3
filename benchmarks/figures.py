"""What a benchmark measures: samples of ours and, taken in turn with them, of a peer."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

import attrs


@attrs.frozen(kw_only=True)
class Figure:
    """One line of the table: *ours* and *peer* hold samples of the same quantity, in ``unit``, taken in pairs.

    ``against`` names the peer. ``limit`` is what the ratio should stay at or below, or without a peer what ours should.
    """

    what: str
    unit: str
    ours: Sequence[float]
    peer: Sequence[float] = ()
    against: str = ""
    limit: float | None = None

    @property
    def ratios(self) -> list[float]:
        """Ours divided by the peer, pair by pair, so that what slows the machine down for a while cancels."""
        return [ours / peer for ours, peer in zip(self.ours, self.peer, strict=True)] if self.peer else []

    @property
    def met(self) -> bool | None:
        """Whether the limit is kept in the median; None without a limit."""
        return None if self.limit is None else median(self.ratios or self.ours) <= self.limit

    def record(self) -> dict[str, Any]:
        """Return the figure as JSON values, every sample included."""
        middle: dict[str, Any] = {"ours_median": median(self.ours)}
        if self.peer:
            low, high = quartiles(self.ratios)
            middle |= {"peer_median": median(self.peer), "ratio": median(self.ratios), "ratio_quartiles": [low, high]}
        return attrs.asdict(self) | middle | {"met": self.met}


def quartiles(samples: Sequence[float]) -> tuple[float, float]:
    """Return the values below which a quarter and three quarters of *samples* lie."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return ordered[round(last * 0.25)], ordered[round(last * 0.75)]
