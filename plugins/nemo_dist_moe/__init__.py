"""Expert parallelism: each rank of ``ep`` holds a part of the experts of a model, and tokens are sent to them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import attrs

from nemo_dist import Axis, MeshPlan, ParallelismSizes, Plugin, Role, RuntimePart, Stage, View, hookimpl
from nemo_dist.hf_model import inner_model
from nemo_dist.plugin.protocol import asked_for
from nemo_dist_moe.config import BETWEEN, WITHIN, MoEParallelizerConfig

if TYPE_CHECKING:
    from torch import nn

    from nemo_dist.mesh.mesh_context import MeshContext
    from nemo_dist.plugin.comm_estimate import ModelFacts, Traffic
    from nemo_dist.plugin.memory_estimate import RankShare

__all__ = ["MoE", "MoEParallelizerConfig"]


@attrs.frozen(eq=False)
class MoE:
    """Distribute whole experts over ``ep``; the strategy shards them further over ``ep_shard``."""

    name: ClassVar[str] = "moe"
    config_type: ClassVar[type] = MoEParallelizerConfig
    stage: ClassVar[int] = Stage.EXPERT
    axes: ClassVar[frozenset[str]] = frozenset({"ep", "ep_shard", BETWEEN, WITHIN})
    # The axes of other plugins with which tests compare this with one process.
    composes_with: ClassVar[frozenset[str]] = frozenset({"cp", "dp_replicate", "dp_shard", "pp", "tp"})

    config: MoEParallelizerConfig = attrs.field(factory=MoEParallelizerConfig)

    @hookimpl
    def views(self, sizes: ParallelismSizes, world_size: int) -> list[View] | None:
        """Divide the ranks of a pipeline stage into ``ep_shard`` groups of ``ep`` ranks, each with all experts.

        With replicas (HSDP), an expert is sharded over the groups within a replica, and replicated between replicas,
        where whole groups fit into one replica.
        """
        ranks = _stage_ranks(sizes, world_size)
        if ranks % sizes.ep_size:
            return None
        copies = ranks // sizes.ep_size
        replica = ranks // (sizes.dp_replicate_size or 1)
        within = replica // sizes.ep_size if replica % sizes.ep_size == 0 else 1
        outer, inner = Axis("pp", sizes.pp_size), Axis("ep", sizes.ep_size)
        if within == copies:
            return [View("moe", (outer, Axis("ep_shard", copies), inner))]
        between = Axis(BETWEEN, copies // within)
        return [
            View("moe", (outer, between, Axis(WITHIN, within), inner), {"ep_shard": (BETWEEN, WITHIN)}),
        ]

    @hookimpl
    def validate(self, plan: MeshPlan, sizes: ParallelismSizes, plugins: tuple[Plugin, ...]) -> list[str]:
        ranks = _stage_ranks(sizes, plan.world_size)
        problems = []
        if ranks % sizes.ep_size:
            problems.append(
                f"ep_size={sizes.ep_size} must divide the {ranks} ranks of dp*cp*tp = {plan.size('dp')}*"
                f"{sizes.cp_size}*{sizes.tp_size}, which share the experts; use a divisor of {ranks}"
            )
        if self.config.dispatcher == "all_reduce" and sizes.ep_size != sizes.tp_size:
            problems.append(
                f"dispatcher='all_reduce' needs ranks that hold the same tokens, ep_size = tp_size (got "
                f"{sizes.ep_size} and {sizes.tp_size}); use 'all_to_all' or 'auto'"
            )
        if asked_for(plugins, "sequence_parallel"):
            problems.append(
                f"sequence_parallel=True cuts the tokens between layers, which routers and experts take whole: no rule "
                f"gathers them there, and their dispatch does the cutting; leave it out, or set ep_size={sizes.ep_size}"
                " to 1"
            )
        if option := asked_for(plugins, "compile"):
            problems.append(f"{option} is not proven with expert parallelism; leave it out, or set ep_size to 1")
        for plugin in plugins:
            for axis in sorted(plugin.axes - self.composes_with - self.axes):
                if axis in plan.dense and plan.size(axis) > 1:
                    problems.append(
                        f"axis {axis!r} has size {plan.size(axis)}, but plugin 'moe' does not compose with it; "
                        f"set it or ep_size to 1"
                    )
        return problems

    @hookimpl
    def shard(self, parts: list[nn.Module], mesh: MeshContext, plan: MeshPlan) -> None:
        from nemo_dist_moe.experts import shard_experts, shard_head

        models = [inner_model(part) for part in parts]
        shard_experts(models, mesh, self.config, experts_everywhere=plan.splitting(Role.LAYERS) == 1)
        if self.config.lm_head_precision is not None:
            shard_head(models, self.config.lm_head_precision)

    @hookimpl
    def runtime(self, parts: list[nn.Module], mesh: MeshContext) -> RuntimePart:
        from nemo_dist_moe.expert_load import ExpertLoad

        return RuntimePart(metrics=ExpertLoad.watch([inner_model(part) for part in parts], mesh).metrics)

    @hookimpl
    def traffic(self, plan: MeshPlan, facts: ModelFacts | None) -> list[Traffic]:
        from nemo_dist_moe.comm_estimate import dispatch, shards

        return [*dispatch(plan, facts, self.config), *shards(plan, facts, self.config)]

    @hookimpl
    def memory(self, ranks: list[RankShare], plan: MeshPlan, model: nn.Module) -> None:
        from nemo_dist_moe.memory_estimate import hold

        hold(ranks, plan, model)

    @hookimpl
    def explain(self, plan: MeshPlan) -> str:
        ep, copies = plan.size("ep"), plan.size("ep_shard")
        shards = f", in {copies} shards" if copies > 1 else ""
        return f"moe: 1/{ep} of the experts on each rank of ep{shards}; dispatcher {self.config.dispatcher}"


def _stage_ranks(sizes: ParallelismSizes, world_size: int) -> int:
    """Return how many ranks hold the same layers, and share their experts."""
    layers = sizes.pp_size * math.prod(sizes.own_axes(Role.LAYERS).values())
    return sizes.dp(world_size) * sizes.model_size // layers
