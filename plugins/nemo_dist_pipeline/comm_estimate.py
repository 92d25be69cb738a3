"""Estimate the bytes that pipeline stages on different ranks send each other in a step; no torch."""

from __future__ import annotations

from itertools import pairwise

from nemo_dist import MeshPlan
from nemo_dist.plugin.comm_estimate import ModelFacts, Traffic, bytes_of
from nemo_dist_pipeline.config import PipelineConfig
from nemo_dist_pipeline.schedule.stage_placement import StagePlacement


def traffic(
    plan: MeshPlan, facts: ModelFacts | None, placement: StagePlacement, config: PipelineConfig
) -> list[Traffic]:
    """Return the sends of a step, with the bytes of the rank that sends most: the first and last send one way only."""
    forward = backward = tied = None
    if facts is not None:
        count = placement.stage_count(config, facts.blocks) or 0
        counts, sent = sending_stages(placement, count), _bytes_between_stages(plan, facts, placement, config)
        forward, backward = (sent * max(sending) for sending in zip(*counts, strict=True))
        if placement.rank_of(0, count) != placement.rank_of(count - 1, count):
            tied = facts.tied_parameters * facts.stored // (plan.size("tp") * plan.size("dp_shard_cp"))
    often = "of every microbatch"
    found = [
        Traffic(axis="pp", collective="send", of="hidden states to the next stage", often=often, sent=forward),
        Traffic(axis="pp", collective="send", of="their gradients to the stage before", often=often, sent=backward),
    ]
    if tied:
        what = "the tied gradient, between first and last stage"
        found.append(Traffic(axis="pp", collective="send", of=what, often="once", sent=tied))
    return found


def sending_stages(placement: StagePlacement, stages: int) -> list[tuple[int, int]]:
    """Return, for every pipeline rank, how many of its stages send forward and how many send back to another rank."""
    ranks = [placement.rank_of(stage, stages) for stage in range(stages)]
    borders = [(before, after) for before, after in pairwise(ranks) if before != after]
    return [
        (sum(before == rank for before, _ in borders), sum(after == rank for _, after in borders))
        for rank in range(placement.pp_size)
    ]


def _bytes_between_stages(plan: MeshPlan, facts: ModelFacts, placement: StagePlacement, config: PipelineConfig) -> int:
    """Return the bytes of the hidden states of all microbatches between two stages, padding rows included."""
    least = placement.microbatches or config.microbatches
    rows = max(least, -(-facts.rows // config.pp_microbatch_size)) * config.pp_microbatch_size
    length = -(-facts.length // plan.size("cp"))
    return rows * length * facts.hidden * (bytes_of(config.dtype) if config.dtype else facts.computed)
