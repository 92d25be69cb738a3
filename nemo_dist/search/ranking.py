"""Search: enumerate, drop what a model or a device cannot do, estimate the rest, and rank it by time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import attrs

from nemo_dist.errors import PluginError
from nemo_dist.planning.validation import integer, shown
from nemo_dist.plugin.memory_estimate import RankShare
from nemo_dist.search.enumeration import Topology, topologies
from nemo_dist.search.estimate import Estimate, Estimator
from nemo_dist.search.hardware import Hardware
from nemo_dist.search.model import SearchedModel
from nemo_dist.search.space import Space

RESERVE = 0.08  # of a device's memory is kept free for what no estimate counts
INSIDE = ("tp", "ep")  # the axes that stay within a node unless asked otherwise


@attrs.frozen(kw_only=True)
class Question:
    """What to search a topology for: steps of ``batch`` sequences of ``length`` tokens, within ``memory`` bytes."""

    space: Space
    model: SearchedModel
    hardware: Hardware
    memory: int
    batch: int = attrs.field()
    length: int = attrs.field()
    imbalance: float = 1.25
    rows: int = 16  # the most sequences in one forward

    def __attrs_post_init__(self) -> None:
        integer("batch", self.batch)
        integer("seq", self.length)
        if not 1 <= self.imbalance < math.inf:
            raise ValueError(f"imbalance must be a number from 1 up (got {shown(self.imbalance)})")

    @property
    def usable(self) -> int:
        """The bytes of a device that an estimate may fill."""
        return int(self.memory * (1 - RESERVE))

    def estimator(self) -> Estimator:
        """Return the estimator for this model and hardware."""
        return Estimator(
            model=self.model,
            hardware=self.hardware,
            batch=self.batch,
            length=self.length,
            imbalance=self.imbalance,
        )


@attrs.define(kw_only=True)
class Answer:
    """What a search found: ``ranked`` estimates that fit, fastest first, and how many topologies went which way.

    ``refused``: how many topologies the plugins refuse for this model, by reason. ``nearest``: the estimate that needs
    least memory, where none fits.
    """

    ranked: list[Estimate] = attrs.field(factory=list)
    enumerated: int = 0
    too_large: int = 0
    uneven: int = 0
    refused: Counter[str] = attrs.field(factory=Counter)
    nearest: Estimate | None = None


def search(question: Question, progress: Callable[[int], None] = lambda count: None) -> Answer:
    """Return every topology that fits, ranked by the estimated time of a step.

    ``progress`` is called with the number of topologies that were enumerated so far.
    """
    answer, estimator = Answer(), question.estimator()
    for topology in topologies(question.space):
        answer.enumerated += 1
        progress(answer.enumerated)
        _judge(topology, question, estimator, answer)
    answer.ranked.sort(key=lambda estimate: (estimate.seconds, estimate.bytes))
    return answer


def _judge(topology: Topology, question: Question, estimator: Estimator, answer: Answer) -> None:
    if not estimator.rows_of(topology):
        answer.uneven += 1
        return
    try:
        ranks = estimator.shares(topology, 1)
        least = _least(ranks)
        if least > question.usable and answer.nearest is not None and least >= answer.nearest.bytes:
            answer.too_large += 1
            return
        found = estimator.estimate(topology, question.rows, lambda size: size <= question.usable)
    except (ValueError, PluginError) as refusal:
        answer.refused[_reason(refusal)] += 1
        return
    if found.bytes <= question.usable:
        answer.ranked.append(found)
    else:
        answer.too_large += 1
        if answer.nearest is None or found.bytes < answer.nearest.bytes:
            answer.nearest = found


def _least(ranks: list[RankShare]) -> int:
    """Return the bytes that the fullest rank holds beside activations."""
    return max(sum(rank.held.values()) for rank in ranks)


def _reason(error: Exception) -> str:
    """Return the first line of a refusal, for counting alike ones."""
    return str(error).removeprefix("- ").partition("\n")[0]
