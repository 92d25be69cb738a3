"""Estimate what Megatron-FSDP sends in a step."""

from __future__ import annotations

from nemo_dist import MeshPlan
from nemo_dist.plugin.comm_estimate import ModelFacts, Traffic, bytes_of, shared
from nemo_dist_megatron_fsdp.config import MegatronFSDPConfig


def traffic(plan: MeshPlan, facts: ModelFacts | None, config: MegatronFSDPConfig) -> list[Traffic]:
    """Return the collectives of parameters and gradients; those of ZeRO 3 and 2 repeat in every forward of a step."""
    shards, level = plan.size("dp_shard_cp"), config.zero_dp_strategy
    if shards == 1:
        return []
    gathered = reduced = None
    if facts is not None:
        tp = plan.size("tp")
        parameters = facts.parameters + (facts.block_parameters if level == 3 else 0)
        size = bytes_of("float32") if config.grad_reduce_in_fp32 else facts.stored
        gathered = (facts.batches if level == 3 else 1) * shared(shards, parameters * facts.computed / tp)
        reduced = (facts.batches if level > 1 else 1) * shared(shards, facts.parameters * size / tp)
    again = ", and again in the backward those of blocks" if level == 3 else ""
    axis = "dp_shard_cp"
    return [
        Traffic(axis=axis, collective="all-gather", of="parameters, by block", often=f"once{again}", sent=gathered),
        Traffic(axis=axis, collective="reduce-scatter", of="gradients, by block", often="once", sent=reduced),
    ]
