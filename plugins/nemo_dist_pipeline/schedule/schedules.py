"""List the schedules of torch's pipelining: how each places stages, what it requires, how long ranks idle; no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping

import attrs

from nemo_dist.errors import UnknownNameError
from nemo_dist.planning.validation import near, shown


@attrs.frozen(kw_only=True)
class Schedule:
    """A schedule: ``name`` as torch calls it.

    ``style``: "loop" gives stages to the ranks round robin, "v" to the first through the last and back again.
    ``per_rank``: the default number of stages on a rank; ``fixed``: no other number works. ``splits``: it runs the
    backward for the weights later than that for the inputs. ``idle``: how long a rank waits in all for each rank beyond
    the first, in forwards of one stage (a backward takes two). ``bounded``: the activations held do not grow with the
    number of microbatches.
    """

    name: str
    style: str = "loop"
    per_rank: int = 1
    fixed: bool = False
    splits: bool = False
    idle: int = 3
    bounded: bool = True

    def microbatch_problem(self, pp_size: int, count: int) -> str | None:
        """Say why *count* microbatches do not fit on *pp_size* ranks, or nothing; the rules are torch's."""
        if self.name == "1F1B" and count < pp_size:
            return f"schedule '1F1B' needs at least as many microbatches as its {pp_size} stages (got {count})"
        if self.name == "DualPipeV" and count < 2 * pp_size:
            return f"schedule 'DualPipeV' needs at least as many microbatches as its {2 * pp_size} stages (got {count})"
        rounds = max(1, count // pp_size)
        if self.name.startswith("Interleaved") and count % rounds:
            fits = next(n for n in range(count - 1, 0, -1) if n % max(1, n // pp_size) == 0)
            return (
                f"schedule {self.name!r} runs {count} microbatches in {rounds} rounds of {pp_size} ranks, which does "
                f"not divide; use {fits} or {count + -count % pp_size}"
            )
        return None

    def stages_problem(self, per_rank: int) -> str | None:
        """Say why *per_rank* stages on every rank do not fit, or nothing."""
        if self.fixed and per_rank != self.per_rank:
            return f"schedule {self.name!r} takes exactly {self.per_rank} stages on a rank (got {per_rank})"
        return None

    def bubble(self, pp_size: int, per_rank: int, count: int) -> float:
        """Return the theoretical idle share of the ranks' time: equal stages, a backward of two forwards, free sends.

        For ZBVZeroBubble it holds from ``2 * pp_size - 1`` microbatches up. Sources: Narayanan et al. 2021
        (arXiv:2104.04473) and Qi et al. 2024 (arXiv:2401.10241).
        """
        idle = self.idle * (pp_size - 1)
        return idle / (3 * per_rank * count + idle)


_V = {"style": "v", "per_rank": 2, "fixed": True, "splits": True, "idle": 1}
SCHEDULES: Mapping[str, Schedule] = {
    schedule.name: schedule
    for schedule in (
        Schedule(name="GPipe", fixed=True, bounded=False),
        Schedule(name="1F1B", fixed=True),
        Schedule(name="LoopedBFS", per_rank=2, bounded=False),
        Schedule(name="Interleaved1F1B", per_rank=2),
        Schedule(name="InterleavedZeroBubble", per_rank=2, splits=True, idle=1),
        Schedule(name="ZBVZeroBubble", **_V),  # type: ignore[arg-type]
        Schedule(name="DualPipeV", **_V),  # type: ignore[arg-type]
    )
}
_SHORT = {"zerobubble": "InterleavedZeroBubble", "zbv": "ZBVZeroBubble", "interleaved": "Interleaved1F1B"}
_PLAIN = {name.lower(): name for name in SCHEDULES} | _SHORT


def named(name: str) -> Schedule:
    """Return the schedule called *name*, however it is spelled; raise UnknownNameError with the near match."""
    plain = "".join(letter for letter in name.lower() if letter.isalnum())
    if plain not in _PLAIN:
        likely = near(plain, _PLAIN)
        for short, long in _PLAIN.items():
            likely = likely.replace(f"{short!r}", f"{long!r}")
        raise UnknownNameError(f"unknown pp_schedule {shown(name)}{likely}; valid names: {', '.join(SCHEDULES)}")
    return SCHEDULES[_PLAIN[plain]]


def stage_ids_this_rank(pp_rank: int, pp_size: int, num_stages: int, style: str = "loop") -> tuple[int, ...]:
    """Return the stages on *pp_rank*, in order: ``loop`` gives them out round robin, ``v`` forth and back.

    Raises ValueError when *num_stages* is no multiple of *pp_size*, or, for ``v``, not twice as many.
    """
    if num_stages % pp_size:
        raise ValueError(f"{num_stages} stages cannot be dealt evenly to {pp_size} pipeline ranks")
    if style == "v":
        if num_stages != 2 * pp_size:
            raise ValueError(f"a V schedule has 2 stages on each of {pp_size} ranks, {2 * pp_size} (got {num_stages})")
        return pp_rank, num_stages - 1 - pp_rank
    return tuple(range(pp_rank, num_stages, pp_size))


def virtual_stages(
    num_layers: int, layers_per_stage: int | None, pp_size: int, schedule: Schedule, rounding: str | None = None
) -> int:
    """Return how many stages *num_layers* make, over all ranks.

    ``layers_per_stage`` None takes the schedule's default number of stages on a rank. Else it is the layers divided by
    it, rounded "up" or "down" to a multiple of *pp_size* as *rounding* says. Raises ValueError where the stages do not
    fit the ranks or the schedule.
    """
    if layers_per_stage is None:
        return pp_size * schedule.per_rank
    count = math.ceil(num_layers / layers_per_stage)
    if count % pp_size:
        if rounding is None:
            raise ValueError(
                f"layers_per_stage={layers_per_stage} makes {count} stages of {num_layers} layers, which is no "
                f"multiple of the {pp_size} pipeline ranks; change it, or set round_virtual_stages_to_pp_multiple"
            )
        count += -count % pp_size if rounding == "up" else -(count % pp_size)
    if count == 0:
        raise ValueError(f"layers_per_stage={layers_per_stage} makes fewer stages than {pp_size} ranks; lower it")
    if problem := schedule.stages_problem(count // pp_size):
        raise ValueError(f"layers_per_stage={layers_per_stage}: {problem}; choose another schedule or number of layers")
    return count
