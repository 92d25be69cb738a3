"""Say which part of the experts a rank holds; no process group."""

from __future__ import annotations

from typing import Any

from nemo_dist import MeshPlan
from nemo_dist.plugin.memory_estimate import RankShare, once_per_model
from nemo_dist_moe.config import WITHIN
from nemo_dist_moe.experts import expert_modules, shard_dim


def hold(ranks: list[RankShare], plan: MeshPlan, model: Any) -> None:
    """Give *ranks* their experts, and the shards that they keep; raise TopologyError with what does not fit."""
    ep = plan.size("ep")
    shards = plan.size(WITHIN) if WITHIN in plan.view_of("ep") else plan.size("ep_shard")
    for name in expert_parameters(model, ep):
        for rank in ranks:
            if name in rank.computed:
                rank.cut(name, 0, ep)
                rank.shard(name, shard_dim(name, rank.computed[name], model, shards), shards)
                rank.overridden.add(name)


@once_per_model
def expert_parameters(model: Any, ep: int) -> tuple[str, ...]:
    """Return the names of the parameters of experts in *model*, which divide over *ep* ranks."""
    _, experts = expert_modules(model, ep)
    return tuple(f"{name}.{key}" for name, module in experts.items() for key, _ in module.named_parameters())
