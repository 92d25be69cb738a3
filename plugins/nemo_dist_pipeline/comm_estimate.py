"""What travels over the borders between stages on different ranks in a step, in bytes; no torch."""

from __future__ import annotations

from itertools import pairwise

from nemo_dist import MeshPlan
from nemo_dist.plugin.comm_estimate import ModelFacts, Traffic, bytes_of
from nemo_dist_pipeline.config import PipelineConfig
from nemo_dist_pipeline.schedule.stage_placement import StagePlacement


def traffic(
    plan: MeshPlan, facts: ModelFacts | None, placement: StagePlacement, config: PipelineConfig
) -> list[Traffic]:
    """Return the sends of a step; the bytes are those of the rank that sends most, as the ends send one way only."""
    forward = backward = tied = None
    if facts is not None:
        count = placement.stage_count(config, facts.blocks) or 0
        borders, sent = crossings(placement, count), _bytes_over_a_border(plan, facts, placement, config)
        forward, backward = (sent * max(crossed) for crossed in zip(*borders, strict=True))
        if placement.rank_of(0, count) != placement.rank_of(count - 1, count):
            tied = facts.tied_parameters * facts.stored // (plan.size("tp") * plan.size("dp_shard_cp"))
    often = "of every microbatch"
    found = [
        Traffic(axis="pp", collective="send", of="hidden states to the next stage", often=often, sent=forward),
        Traffic(axis="pp", collective="send", of="their gradients to the stage before", often=often, sent=backward),
    ]
    return found + [
        Traffic(
            axis="pp", collective="send", of="the tied gradient, between first and last stage", often="once", sent=n
        )
        for n in (tied,)
        if n
    ]


def crossings(placement: StagePlacement, stages: int) -> list[tuple[int, int]]:
    """Return, for every pipeline rank, how many of its stages send forward and how many send back to another rank."""
    where = [placement.rank_of(stage, stages) for stage in range(stages)]
    over = [(here, there) for here, there in pairwise(where) if here != there]
    return [
        (sum(here == rank for here, _ in over), sum(there == rank for _, there in over))
        for rank in range(placement.pp_size)
    ]


def _bytes_over_a_border(plan: MeshPlan, facts: ModelFacts, placement: StagePlacement, config: PipelineConfig) -> int:
    """Return the bytes of the hidden states of all microbatches, those of rows that fill up included."""
    least = placement.microbatches or config.microbatches
    rows = max(least, -(-facts.rows // config.pp_microbatch_size)) * config.pp_microbatch_size
    length = -(-facts.length // plan.size("cp"))
    return rows * length * facts.hidden * (bytes_of(config.dtype) if config.dtype else facts.computed)
