"""Describe the schedule of a step for a picture: torch's own actions, and which modules each stage has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nemo_dist.plugin.step_schedule import StepSchedule, Task
from nemo_dist_pipeline.schedule.actions import Order
from nemo_dist_pipeline.schedule.simulation import simulate
from nemo_dist_pipeline.schedule.visualize import WHAT

if TYPE_CHECKING:
    from nemo_dist.plugin.comm_estimate import ModelFacts
    from nemo_dist_pipeline.config import PipelineConfig
    from nemo_dist_pipeline.schedule.stage_placement import StagePlacement

_MOST = 12_000  # actions of an order that are drawn; a steady state repeats itself


def step_schedule(
    facts: ModelFacts | None, model: Any, placement: StagePlacement, config: PipelineConfig
) -> StepSchedule:
    """Return the schedule of a step with the batch in *facts*; imports torch."""
    stages = _stages(model, placement, config) or placement.stage_count(config, facts.blocks if facts else None)
    notes = []
    if stages is None:
        stages = placement.stage_count(config, placement.pp_size * (config.layers_per_stage or 1)) or 1
        notes.append(f"drawn with {stages} stages: how many layers_per_stage makes depends on the model")
    count, problem = _microbatches(facts, placement, config)
    notes += [f"{problem}; drawn with {count}, as if each data-parallel rank had more rows in its batch"] * bool(
        problem
    )
    drawn = _drawn(count, stages, placement)
    if drawn < count:
        notes.append(f"drawn with {drawn} of the {count} microbatches; the middle of the schedule repeats itself")
    timeline = simulate(_order(stages, drawn, placement))
    lanes = tuple(
        tuple(Task(slot.action.kind, slot.action.stage, slot.action.microbatch, slot.start, slot.end) for slot in slots)
        for slots in timeline.ranks
    )
    return StepSchedule(
        axis="pp",
        name=placement.name,
        lanes=lanes,
        kinds=WHAT,
        owners=tuple(placement.rank_of(stage, stages) for stage in range(stages)),
        microbatches=count,
        rows=config.pp_microbatch_size,
        idle=placement.bubble(stages, count),
        notes=tuple(notes),
        problem=problem,
    )


def _stages(model: Any, placement: StagePlacement, config: PipelineConfig) -> int:
    """Return the number of stages of *model*, 0 without one; raise ValueError if it cannot be cut."""
    if model is None:
        return 0
    from nemo_dist_pipeline.partition.model_structure import ModelStructure
    from nemo_dist_pipeline.partition.split import division_of

    return len(division_of(model, ModelStructure.of(model), placement, config))


def _microbatches(facts: ModelFacts | None, placement: StagePlacement, config: PipelineConfig) -> tuple[int, str]:
    """Return the number of microbatches in a step, and why that is not what the batch makes, where it is not."""
    given = placement.microbatches or config.microbatches
    usual = 4 * placement.pp_size
    if given or facts is None:
        return given or usual, ""
    count = -(-facts.rows // (facts.batches * config.pp_microbatch_size))
    if placement.joins:
        count *= facts.batches
    problem = placement.microbatch_problem(count)
    return (count, "") if problem is None else (usual, problem)


def _drawn(count: int, stages: int, placement: StagePlacement) -> int:
    """Return with how many microbatches the schedule is drawn: all, unless they are too many to see."""
    if placement.schedule is None or 3 * stages * count <= _MOST:
        return count
    rounds = max(2, _MOST // (3 * stages * placement.pp_size))
    return min(count, rounds * placement.pp_size)


def _order(stages: int, microbatches: int, placement: StagePlacement) -> Order:
    from nemo_dist_pipeline.runtime.torch_stage import torch_order

    if placement.schedule is None:
        return placement.order
    return torch_order(placement.schedule, placement.pp_size, stages // placement.pp_size, microbatches)
