"""Tell which stage is on which pipeline rank, and how many microbatches the schedule takes; no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from nemo_dist_pipeline.schedule.actions import Order, problems_of, read
from nemo_dist_pipeline.schedule.schedules import Schedule, named, stage_ids_this_rank, virtual_stages
from nemo_dist_pipeline.schedule.simulation import simulate

if TYPE_CHECKING:
    from nemo_dist_pipeline.config import PipelineConfig


@attrs.frozen(kw_only=True)
class StagePlacement:
    """A schedule on ``pp_size`` ranks: one of torch's, or the user's own ``order`` from a file (``schedule`` None).

    ``microbatches``: how many it takes, None for any number that fits.
    """

    pp_size: int
    schedule: Schedule | None = None
    order: Order = ()

    @classmethod
    def of(cls, config: PipelineConfig, pp_size: int) -> tuple[StagePlacement, list[str]]:
        """Return the placement that *config* asks for on *pp_size* ranks, and what is wrong with it."""
        if config.pp_schedule_csv is None:
            return cls(pp_size=pp_size, schedule=named(config.pp_schedule or "1F1B")), []
        order, problems = read(config.pp_schedule_csv)
        where = f"pp_schedule_csv {config.pp_schedule_csv!r}"
        if not problems and len(order) != pp_size:
            problems.append(
                f"{where} has {len(order)} lines, but there are {pp_size} pipeline ranks; write one per rank"
            )
        if not problems:
            problems += [f"{where}: {problem}" for problem in problems_of(order)]
        if not problems and (stuck := simulate(order).stuck):
            waits = "; ".join(f"line {rank + 1} waits at {action}" for rank, action in sorted(stuck.items()))
            problems.append(f"{where} ends in a deadlock: {waits}")
        return cls(pp_size=pp_size, order=order), problems

    @property
    def name(self) -> str:
        """The name of the schedule."""
        return self.schedule.name if self.schedule else "from a file"

    @property
    def microbatches(self) -> int | None:
        """The number of microbatches that the user's own order is for."""
        return None if self.schedule else 1 + max(action.microbatch for line in self.order for action in line)

    @property
    def stages(self) -> int | None:
        """The number of stages that the user's own order is for."""
        return None if self.schedule else 1 + max(action.stage for line in self.order for action in line)

    def bubble(self, stages: int | None, count: int) -> float:
        """Return the share of the time that ranks are idle in theory, with *count* microbatches."""
        if self.schedule is None:
            return simulate(self.order).bubble
        return self.schedule.bubble(self.pp_size, (stages or 0) // self.pp_size or self.schedule.per_rank, count)

    @property
    def joins(self) -> bool:
        """Whether several batches may run in one schedule, because it does not hold all their activations at once."""
        return self.schedule is not None and self.schedule.bounded

    @property
    def splits(self) -> bool:
        """Whether a backward is run in two parts."""
        return self.schedule.splits if self.schedule else any(a.kind == "I" for line in self.order for a in line)

    def stage_ids(self, rank: int, num_stages: int) -> tuple[int, ...]:
        """Return the stages on pipeline *rank*, in order."""
        if self.schedule is None:
            return tuple(sorted({action.stage for action in self.order[rank]}))
        return stage_ids_this_rank(rank, self.pp_size, num_stages, self.schedule.style)

    def rank_of(self, stage: int, num_stages: int | None = None) -> int:
        """Return the pipeline rank of *stage*; ``num_stages`` is needed for other stages than the first."""
        total = self.stages or num_stages or self.pp_size * (2 if self.schedule and self.schedule.style == "v" else 1)
        return next(rank for rank in range(self.pp_size) if stage in self.stage_ids(rank, total))

    def stage_count(self, config: PipelineConfig, layers: int | None = None) -> int | None:
        """Return how many stages *config* makes of a model with *layers* layers; None when only the layers can tell.

        Raises ValueError where the stages do not fit the ranks or the schedule.
        """
        if self.schedule is None or config.parts:
            return self.stages or len(config.parts or ())
        if layers is None:
            return None if config.layers_per_stage else self.pp_size * self.schedule.per_rank
        rounding = config.round_virtual_stages_to_pp_multiple
        return virtual_stages(layers, config.layers_per_stage, self.pp_size, self.schedule, rounding)

    def microbatch_problem(self, count: int) -> str | None:
        """Say why *count* microbatches do not fit, or nothing."""
        if self.schedule is not None:
            return self.schedule.microbatch_problem(self.pp_size, count)
        return (
            None
            if count == self.microbatches
            else f"the schedule is for {self.microbatches} microbatches (got {count})"
        )
