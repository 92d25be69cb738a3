"""Say what every rank of a pipeline holds and how long it waits, by the division and the schedule that it will run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import attrs

from nemo_dist import MeshPlan
from nemo_dist.errors import TopologyError
from nemo_dist.plugin.comm_estimate import ModelFacts, bytes_of
from nemo_dist.plugin.memory_estimate import RankShare, StageShare, once_per_model
from nemo_dist_pipeline.config import PipelineConfig
from nemo_dist_pipeline.partition.model_structure import ModelStructure
from nemo_dist_pipeline.runtime.torch_stage import torch_order
from nemo_dist_pipeline.schedule.actions import Action
from nemo_dist_pipeline.schedule.simulation import COST, simulate
from nemo_dist_pipeline.schedule.stage_placement import StagePlacement

# Microbatches for each stage: from there on more of them change neither what is alive nor how long all wait.
_ENOUGH = 4


def hold(
    ranks: list[RankShare],
    plan: MeshPlan,
    facts: ModelFacts,
    placement: StagePlacement,
    config: PipelineConfig,
    model: Any,
) -> None:
    """Replace the one entry of *ranks* by one for each pipeline rank; raise ValueError with what does not fit."""
    structure = structure_of(model)
    stages = placement.stage_count(config, len(structure.layers)) or 0
    division = divided(model, stages, config.parts, config.layers_per_stage is not None)
    count = -(-facts.rows // config.pp_microbatch_size)
    if problem := placement.microbatch_problem(count):
        raise TopologyError([f"{problem}: {facts.rows} rows in microbatches of {config.pp_microbatch_size}"])
    (whole,) = ranks
    load = loads(placement, stages, count)
    ranks[:] = [
        _share(whole, rank, structure, division, placement, count, load, facts, config)
        for rank in range(placement.pp_size)
    ]


@once_per_model
def structure_of(model: Any) -> ModelStructure:
    """Return where *model* can be cut."""
    return ModelStructure.of(model)


@once_per_model
def divided(
    model: Any, stages: int, parts: tuple[tuple[str, ...], ...] | None, by_count: bool
) -> tuple[tuple[str, ...], ...]:
    """Return the modules of every stage, as the split of the model will find them."""
    structure = structure_of(model)
    return structure.divide(model, stages, by_count) if parts is None else structure.checked(model, parts)


@attrs.frozen(kw_only=True)
class Load:
    """What a schedule makes a rank do: the most microbatches alive in each of its stages, and its idle share."""

    alive: tuple[tuple[int, ...], ...]
    idle: float


@lru_cache(maxsize=1024)
def loads(placement: StagePlacement, stages: int, count: int) -> Load:
    """Return the load of *placement* with *stages* stages and *count* microbatches, from the order of its actions."""
    few = _fewer(placement, stages, count)
    order = placement.order
    if placement.schedule is not None:
        order = torch_order(placement.schedule, placement.pp_size, stages // placement.pp_size, few)
    timeline = simulate(order)
    work = sum(COST[action.kind] for line in order for action in line) / len(order)
    waits = timeline.length - work  # the same with more microbatches
    grows = placement.schedule is not None and not placement.schedule.bounded
    alive = tuple(_most_alive(line, count if grows else 0) for line in order)
    return Load(alive=alive, idle=waits / (waits + work * count / few))


def _fewer(placement: StagePlacement, stages: int, count: int) -> int:
    """Return a number of microbatches, at most *count*, that shows all there is to see of the schedule."""
    most = _ENOUGH * stages
    fitting = (few for few in range(most, 0, -1) if placement.microbatch_problem(few) is None)
    return count if count <= most else next(fitting, count)


def _most_alive(line: Sequence[Action], all_of_them: int) -> tuple[int, ...]:
    """Return, by stage of this rank, the microbatches whose activations it holds when it holds most of them.

    A backward in two parts frees them with the second, which needs the inputs of all matrices. *all_of_them*: the
    schedule runs every forward before a backward, so this many are alive.
    """
    own = sorted({action.stage for action in line})
    alive, most = dict.fromkeys(own, 0), dict.fromkeys(own, 0)
    for action in line:
        if action.kind == "F":
            alive[action.stage] += 1
        elif action.kind in "BW":
            alive[action.stage] -= 1
        if sum(alive.values()) > sum(most.values()):
            most = dict(alive)
    return tuple(all_of_them or most[stage] for stage in own)


def _share(
    whole: RankShare,
    rank: int,
    structure: ModelStructure,
    division: tuple[tuple[str, ...], ...],
    placement: StagePlacement,
    count: int,
    load: Load,
    facts: ModelFacts,
    config: PipelineConfig,
) -> RankShare:
    """Return what pipeline *rank* holds of the *whole*."""
    stages = placement.stage_ids(rank, len(division))
    kept = [name for stage in stages for name in _parameters(structure, division, stage, whole)]
    units = {unit for stage in stages for unit in division[stage]}
    added = [name for name in whole.added if structure.owner(name) in units]
    own = [
        StageShare(
            blocks=tuple(unit for unit in division[stage] if unit in set(structure.layers)),
            first=stage == 0,
            last=stage == len(division) - 1,
            alive=alive,
        )
        for stage, alive in zip(stages, load.alive[rank], strict=True)
    ]
    size = bytes_of(config.dtype) if config.dtype else facts.computed
    received = sum((not stage.first) + (not stage.last) for stage in own)
    return attrs.evolve(
        whole,
        computed={name: whole.computed[name] for name in kept},
        stored={name: whole.stored[name] for name in kept},
        added={name: whole.added[name] for name in added},
        stages=tuple(own),
        rows=config.pp_microbatch_size,
        forwards=count,
        idle=load.idle,
        bytes=dict(whole.bytes),
        # By token, as plugins that act later split the sequence.
        bytes_per_token={
            **whole.bytes_per_token,
            "pipeline buffers": received * count * config.pp_microbatch_size * facts.hidden * size,
        },
        overridden=set(whole.overridden),
    )


def _parameters(
    structure: ModelStructure, division: tuple[tuple[str, ...], ...], stage: int, whole: RankShare
) -> list[str]:
    """Return the names of the parameters of *stage*; a tied embedding is on the first and the last one."""
    own = set(division[stage])
    tied = set(structure.tied or ()) if stage in (0, len(division) - 1) else set()
    return [name for name in whole.computed if structure.owner(name) in own or name in tied]
