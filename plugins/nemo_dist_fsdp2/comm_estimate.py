"""Estimate what sharded data parallelism sends in a step."""

from __future__ import annotations

from nemo_dist import MeshPlan, Role
from nemo_dist.plugin.comm_estimate import ModelFacts, Traffic, bytes_of, shared


def traffic(
    plan: MeshPlan, facts: ModelFacts | None, reshard: bool | int | None, reduction: str | None, deferred: bool
) -> list[Traffic]:
    """Return the collectives of parameters and gradients; *reduction* names the dtype that gradients are summed in.

    ``deferred``: of several batches one after the other, gradients are reduced after the last only.
    """
    between = replica_axis(plan)
    shards, replicas = plan.size("dp_shard_cp"), plan.size(between)
    reshard = plan.splitting(Role.LAYERS) == 1 if reshard is None else reshard
    again = ", and again in the backward those of blocks and embedding" if reshard else ""
    gathered = reduced = averaged = None
    if facts is not None:
        part = plan.size("tp") * plan.size("pp")
        elsewhere = facts.expert_parameters if any("ep" in view for view in plan.views) else 0  # counted there
        here = facts.parameters - elsewhere
        twice = facts.block_parameters - elsewhere + facts.embedding_parameters - _skipped(facts, elsewhere > 0)
        twice = twice if reshard else 0
        trained = facts.trained - (facts.trained_experts if elsewhere else 0)
        gathered = facts.batches * shared(shards, (here + twice) * facts.computed / part)  # a backward frees all
        size = (bytes_of(reduction) if reduction else facts.stored) * (1 if deferred else facts.batches)
        reduced = shared(shards, trained * size / part)
        averaged = 2 * shared(replicas, trained * size / part / shards)
    reductions = "once" if deferred else "once for every batch of a list"
    found = [
        Traffic(
            axis="dp_shard_cp", collective="all-gather", of="parameters, by block", often=f"once{again}", sent=gathered
        ),
        Traffic(
            axis="dp_shard_cp", collective="reduce-scatter", of="gradients, by block", often=reductions, sent=reduced
        ),
    ]
    copies = Traffic(axis=between, collective="all-reduce", of="gradient shards", often=reductions, sent=averaged)
    return [*(found if shards > 1 else ()), *([copies] if replicas > 1 else ())]


def _skipped(facts: ModelFacts, experts_elsewhere: bool) -> int:
    """Return the numbers that are not gathered for a backward, which does not come to them.

    The last of what it does not come to is: FSDP2 gathers one ahead.
    """
    return sum(held - (experts if experts_elsewhere else 0) for held, experts in facts.skipped[:-1])


def replica_axis(plan: MeshPlan) -> str:
    """Return the name along which ranks hold equal shards: with the axes of other plugins that split the batch, too."""
    return "replicas" if "replicas" in plan.dense and plan.size("replicas") > 1 else "dp_replicate"
