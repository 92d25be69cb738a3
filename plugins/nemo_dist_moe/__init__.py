"""Expert parallelism: each rank of ``ep`` holds a part of the experts of a model, and tokens are sent to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import attrs

from nemo_dist import Axis, MeshPlan, ParallelismSizes, Plugin, RuntimePart, Stage, View, hookimpl
from nemo_dist.plugin.mixed_precision import mixed_precision_fields
from nemo_dist.plugin.options import boolean, one_of, optional, options
from nemo_dist_moe.comm_estimate import BETWEEN, dispatch, shards

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.fsdp import MixedPrecisionPolicy

    from nemo_dist.mesh.mesh_context import MeshContext
    from nemo_dist.plugin.comm_estimate import ModelFacts, Traffic

_DISPATCHERS = ("auto", "all_to_all", "all_reduce")
_PRECISIONS = ("float32", "bfloat16", "float16")
_WITHIN = "ep_within_replica"


@options(plugin="moe")
class MoEParallelizerConfig:
    """Options of expert parallelism.

    ``dispatcher``: ``"all_to_all"`` sends every token to the ranks of its experts; ``"all_reduce"`` runs the local
    experts on all tokens and sums the outputs, which needs ranks that hold the same tokens (ep = tp); ``"auto"`` takes
    the first in training, the second where no gradient is needed. ``reshard_after_forward``: free the gathered experts
    of a block after its forward; None does as the strategy does. ``mp_policy``: the dtypes for the experts, in place of
    the strategy's; torch's ``MixedPrecisionPolicy`` or its fields as a dict of dtype names. ``lm_head_precision``: the
    dtype to compute the output head in, "float32" say; None is the strategy's.
    """

    dispatcher: str = attrs.field(default="auto", validator=one_of(_DISPATCHERS))
    reshard_after_forward: bool | None = attrs.field(default=None, validator=optional(boolean))
    mp_policy: MixedPrecisionPolicy | dict[str, Any] | None = attrs.field(
        default=None, converter=mixed_precision_fields
    )
    lm_head_precision: str | None = attrs.field(
        default=None,
        converter=lambda value: None if value is None else str(value).removeprefix("torch."),
        validator=optional(one_of(_PRECISIONS)),
    )


@attrs.frozen(eq=False)
class MoE:
    """Distribute whole experts over ``ep``; the strategy shards them further over ``ep_shard``."""

    name: ClassVar[str] = "moe"
    config_type: ClassVar[type] = MoEParallelizerConfig
    stage: ClassVar[int] = Stage.EXPERT
    axes: ClassVar[frozenset[str]] = frozenset({"ep", "ep_shard", BETWEEN, _WITHIN})
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
            View("moe", (outer, between, Axis(_WITHIN, within), inner), {"ep_shard": (BETWEEN, _WITHIN)}),
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
        if any(getattr(plugin.config, "sequence_parallel", False) for plugin in plugins):
            problems.append(
                f"sequence_parallel=True cuts the tokens between layers, which routers and experts take whole: no rule "
                f"gathers them there, and their dispatch does the cutting; leave it out, or set ep_size={sizes.ep_size}"
                " to 1"
            )
        if any(getattr(plugin.config, "enable_compile", False) for plugin in plugins):
            problems.append("enable_compile is not proven with expert parallelism; leave it out, or set ep_size to 1")
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

        shard_experts(parts, mesh, self.config, experts_everywhere=plan.size("pp") == 1)
        if self.config.lm_head_precision is not None:
            shard_head(parts, self.config.lm_head_precision)

    @hookimpl
    def runtime(self, parts: list[nn.Module], mesh: MeshContext) -> RuntimePart:
        from nemo_dist_moe.expert_load import ExpertLoad

        return RuntimePart(metrics=ExpertLoad.watch(parts, mesh).metrics)

    @hookimpl
    def traffic(self, plan: MeshPlan, facts: ModelFacts | None) -> list[Traffic]:
        return [*dispatch(plan, facts, self.config), *shards(plan, facts, self.config)]

    @hookimpl
    def explain(self, plan: MeshPlan) -> str:
        ep, copies = plan.size("ep"), plan.size("ep_shard")
        shards = f", in {copies} shards" if copies > 1 else ""
        return f"moe: 1/{ep} of the experts on each rank of ep{shards}; dispatcher {self.config.dispatcher}"


def _stage_ranks(sizes: ParallelismSizes, world_size: int) -> int:
    return sizes.dp(world_size) * sizes.cp_size * sizes.tp_size
