"""Tensor parallelism: shard every matrix of a model over the ``tp`` ranks, by the model's plan from transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import attrs

from nemo_dist import MeshPlan, Stage, hookimpl
from nemo_dist_tensor.config import TensorConfig
from nemo_dist_tensor.styles import STYLES

if TYPE_CHECKING:
    from torch import nn

    from nemo_dist.mesh.mesh_context import MeshContext
    from nemo_dist.plugin.comm_estimate import ModelFacts, Traffic
    from nemo_dist.plugin.memory_estimate import RankShare
    from nemo_dist_tensor.tp_plan import Rules

__all__ = ["TensorConfig", "TensorParallel"]


@attrs.frozen(eq=False)
class TensorParallel:
    """Shard matrices, vocabulary and loss over ``tp``; with sequence parallelism also the activations between them."""

    name: ClassVar[str] = "tensor"
    config_type: ClassVar[type] = TensorConfig
    stage: ClassVar[int] = Stage.TENSOR
    axes: ClassVar[frozenset[str]] = frozenset({"tp"})
    composes_with: ClassVar[frozenset[str]] = frozenset({"adapters"})

    config: TensorConfig = attrs.field(factory=TensorConfig)

    @property
    def features(self) -> Mapping[str, str]:
        """What other plugins may not be proven with."""
        return {"sequence_parallel": "sequence_parallel=True"} if self.config.sequence_parallel else {}

    @hookimpl
    def validate(self) -> list[str]:
        plan, found = self.config.tp_plan or {}, []
        for rule, style in plan.items():
            if style not in STYLES:
                from nemo_dist_tensor.tp_plan import unknown_style

                found.append(f"tp_plan gives {rule!r} the style {style!r}, {unknown_style(style)}")
        if self.config.enable_async_tensor_parallel:
            if not self.config.sequence_parallel:
                found.append(
                    "enable_async_tensor_parallel overlaps the collectives of sequence parallelism, which is off; "
                    "leave it out"
                )
            found.append(
                "enable_async_tensor_parallel is the work of torch.compile on the symmetric memory of GPUs, which a "
                "CPU does not have and which is not proven here; leave it out"
            )
        return found

    @hookimpl
    def shard(self, parts: list[nn.Module], mesh: MeshContext) -> None:
        from nemo_dist_tensor.apply import apply_tensor_parallelism

        if mesh.tp_size > 1:
            apply_tensor_parallelism(parts, mesh, self.config)

    @hookimpl
    def runtime(self, parts: list[nn.Module], mesh: MeshContext) -> None:
        from nemo_dist_tensor.adapters import install

        if mesh.tp_size > 1:
            install(parts)

    @hookimpl
    def explain(self, plan: MeshPlan, model: nn.Module | None) -> str:
        ranks, count = plan.size("tp"), len(self.config.tp_plan or {})
        what = "attention, feed-forward, embedding and head by the model's own plan"
        what += f" and {count} rules of tp_plan" if count else ""
        if model is not None:
            from nemo_dist_tensor.tp_plan import described

            what = described(self._rules(model, plan))
        tokens = f"; between attention and feed-forward a rank keeps 1/{ranks} of the tokens"
        cut = tokens if self.config.sequence_parallel else ""
        return f"tensor: every matrix in {ranks} parts: {what}{cut}; logits stay cut where there are labels"

    @hookimpl
    def traffic(self, plan: MeshPlan, facts: ModelFacts | None, model: nn.Module | None) -> list[Traffic]:
        if plan.size("tp") == 1:
            return []
        from nemo_dist_tensor.comm_estimate import measured, unmeasured

        if facts is None or model is None:
            return unmeasured(self.config.sequence_parallel)
        return measured(model, self._rules(model, plan), plan, facts, self.config.sequence_parallel)

    @hookimpl
    def memory(self, ranks: list[RankShare], plan: MeshPlan, model: nn.Module) -> None:
        if plan.size("tp") == 1:
            return
        from nemo_dist_tensor.memory_estimate import hold

        experts = not any("ep" in view for view in plan.views)
        hold(ranks, model, plan.size("tp"), self.config.tp_plan or {}, self.config.sequence_parallel, experts)

    def _rules(self, model: nn.Module, plan: MeshPlan) -> Rules:
        from nemo_dist_tensor.tp_plan import match

        axes = {axis.name for view in plan.views for axis in view.axes}
        return match(model, self.config.tp_plan or {}, skip_experts="ep" in axes)
