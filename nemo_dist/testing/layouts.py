"""Compare what a rank holds with the whole tensor of one process, under every layout that a parallelism may give it.

A rank may hold the rows and tokens of its own batch (``Tokens``), of these only a part (sequence parallelism), and of
their features all, or some (heads, columns of a projection, a part of the vocabulary, in any order). A tensor that
fits one of these is right. Whatever has another shape is left open: tokens that were sent to experts, say.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum

import attrs
import torch
from torch import Tensor

_MOST_PAIRS = 2**22  # of columns, that are compared with each other to find which ones a rank holds


class Verdict(Enum):
    """What a comparison says: equal up to rounding, different, or of a shape that no layout explains."""

    RIGHT = "right"
    WRONG = "wrong"
    OPEN = "open"


@attrs.frozen(kw_only=True, eq=False)
class Tokens:
    """Which tokens of the global batch a rank computes on: ``own``, their numbers, of shape (rows, tokens of a row).

    Tokens of the global batch of ``rows`` x ``length`` are numbered row by row.
    """

    own: Tensor
    rows: int
    length: int

    def pick(self, whole: Tensor, local: Tensor, peers: int, place: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield *whole* reduced to the tokens that *local* may hold, each time beside *local* in the same form.

        ``peers`` ranks hold the same ``own``, and this one is number ``place`` of them.
        """
        own, length = self.own, self.length
        most = -(-own.shape[1] // peers)
        mine = own[:, place * most : (place + 1) * most]
        for tokens in (own, mine) if peers > 1 else (own,):
            if tuple(whole.shape[:2]) == (self.rows, length) and local.shape[:2] == tokens.shape:
                yield whole.flatten(0, 1)[tokens], local
            elif whole.shape[0] == self.rows * length and local.shape[0] == tokens.numel():
                yield whole[tokens.flatten()], local
        if tuple(whole.shape[:2]) == (1, length) and local.shape[1:2] == own.shape[1:]:
            yield whole[0][own[:1] % length].expand(local.shape[0], *[-1] * (whole.dim() - 1)), local  # positions
        elif whole.shape[0] == self.rows and tuple(whole.shape[:2]) != (self.rows, length):
            yield whole[own[:, 0] // length], local  # one vector for each row
        elif whole.shape[0] not in (self.rows, self.rows * length):
            yield whole, local


@attrs.frozen(kw_only=True, eq=False)
class Match:
    """The result for one rank: the ``verdict``, the relative ``error``, what was expected, and which features it has.

    ``expected`` is None unless the rank should hold all features.
    """

    verdict: Verdict
    error: float = 0.0
    expected: Tensor | None = None
    features: frozenset[int] | None = None
    of: int = 0


def match(whole: Tensor, local: Tensor, tokens: Tokens, bound: float, peers: int = 1, place: int = 0) -> Match:
    """Compare *local* with *whole* under every layout; *bound* is the relative error that rounding explains."""
    worst = Match(verdict=Verdict.OPEN)
    for expected, found in tokens.pick(whole, local, peers, place):
        result = _compare(expected.double(), found.double(), bound)
        if result.verdict is Verdict.RIGHT:
            return result
        if worst.verdict is Verdict.OPEN:
            worst = result
    return worst


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference relative to that of *expected*; infinite where a number is no number."""
    error = (found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
    return error.item() if error.isfinite() else float("inf")


def _compare(expected: Tensor, found: Tensor, bound: float) -> Match:
    if expected.shape == found.shape:
        error = relative(found, expected)
        return Match(verdict=_verdict(error, bound), error=error, expected=expected)
    differing = [dim for dim in range(expected.dim()) if expected.dim() == found.dim()]
    differing = [dim for dim in differing if expected.shape[dim] != found.shape[dim]]
    if len(differing) != 1 or found.shape[differing[0]] > expected.shape[differing[0]]:
        return Match(verdict=Verdict.OPEN)
    return _some_features(expected.movedim(differing[0], 0), found.movedim(differing[0], 0), bound)


def _some_features(expected: Tensor, found: Tensor, bound: float) -> Match:
    """Compare where *found* has only some of the features of *expected*, which are the first dim of both."""
    all_, some = expected.flatten(1), found.flatten(1)
    if len(all_) * len(some) > _MOST_PAIRS:
        return Match(verdict=Verdict.OPEN)
    distances = torch.cdist(some, all_, compute_mode="donot_use_mm_for_euclid_dist")
    least, nearest = distances.min(dim=1)
    norm = all_[nearest].norm().clamp(min=1e-30)
    error = (least.norm() / norm).item()
    features = frozenset(nearest.tolist())
    return Match(verdict=_verdict(error, bound), error=error, features=features, of=len(all_))


def _verdict(error: float, bound: float) -> Verdict:
    return Verdict.RIGHT if error <= bound else Verdict.WRONG
