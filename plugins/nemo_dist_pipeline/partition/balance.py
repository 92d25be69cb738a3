"""Divide consecutive layers into stages so that the most expensive stage costs as little as possible; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate


def balanced(costs: Sequence[float], stages: int, first: float = 0.0, last: float = 0.0) -> tuple[int, ...]:
    """Return how many of the layers with *costs*, in order, each of *stages* stages takes; at least one each.

    ``first`` and ``last`` are what the first and the last stage cost besides their layers. The division
    minimises the largest cost of a stage and, among equally good ones, the sum of squares, which spreads equal layers
    evenly. Raises ValueError for fewer layers than stages.
    """
    layers = len(costs)
    if not 1 <= stages <= layers:
        raise ValueError(f"{layers} layers cannot make {stages} stages; every stage takes at least one layer")
    sums = [0.0, *accumulate(costs)]
    extra = [0.0] * stages
    extra[0] += first
    extra[-1] += last
    # best[n]: the least (maximum, sum of squares, cuts) of dividing the first n layers into the stages so far
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, ())}
    for stage in range(stages):
        reached: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        for end in range(stage + 1, layers - (stages - stage - 1) + 1):
            options = []
            for start, (highest, squares, sizes) in best.items():
                if start < end:
                    cost = sums[end] - sums[start] + extra[stage]
                    options.append((_rounded(max(highest, cost)), _rounded(squares + cost**2), (*sizes, end - start)))
            if options:
                # Among equals the earlier stages take more, because the later ones wait for them anyway.
                reached[end] = min(options, key=lambda option: (option[0], option[1], tuple(-n for n in option[2])))
        best = reached
    return best[layers][2]


def _rounded(value: float) -> float:
    """Round away what depends on the order of summation, so that every rank finds the same division."""
    return float(f"{value:.9g}")
