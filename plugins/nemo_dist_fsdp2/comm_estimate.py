"""Estimate what sharded data parallelism sends in a step."""

from __future__ import annotations

from nemo_dist import MeshPlan, Role
from nemo_dist.plugin.comm_estimate import ModelFacts, Traffic, bytes_of, shared


def traffic(
    plan: MeshPlan, facts: ModelFacts | None, reshard: bool | int | None, reduction: str | None
) -> list[Traffic]:
    """Return the collectives of parameters and gradients; *reduction* names the dtype that gradients are summed in."""
    shards, replicas = plan.size("dp_shard_cp"), plan.size("dp_replicate")
    if shards == 1:
        return []
    reshard = plan.splitting(Role.LAYERS) == 1 if reshard is None else reshard
    again = ", and again in the backward those of blocks and embedding" if reshard else ""
    gathered = reduced = averaged = None
    if facts is not None:
        part = plan.size("tp") * plan.size("pp")
        elsewhere = facts.expert_parameters if any("ep" in view for view in plan.views) else 0  # counted there
        here = facts.parameters - elsewhere
        twice = facts.block_parameters - elsewhere + facts.embedding_parameters if reshard else 0
        gathered = facts.batches * shared(shards, (here + twice) * facts.computed / part)  # a backward frees all
        size = bytes_of(reduction) if reduction else facts.stored
        reduced = shared(shards, here * size / part)
        averaged = 2 * shared(replicas, here * size / part / shards)
    found = [
        Traffic(
            axis="dp_shard_cp", collective="all-gather", of="parameters, by block", often=f"once{again}", sent=gathered
        ),
        Traffic(axis="dp_shard_cp", collective="reduce-scatter", of="gradients, by block", often="once", sent=reduced),
    ]
    copies = Traffic(axis="dp_replicate", collective="all-reduce", of="gradient shards", often="once", sent=averaged)
    return [*found, copies] if replicas > 1 else found
