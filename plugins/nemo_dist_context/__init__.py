"""Context parallelism: split every sequence over the ``cp`` ranks, each of which computes its part of the tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import attrs

from nemo_dist import MeshPlan, RuntimePart, Stage, hookimpl
from nemo_dist.hf_model import inner_model
from nemo_dist_context.config import EXCHANGES, ContextConfig

if TYPE_CHECKING:
    from torch import nn

    from nemo_dist import MeshContext
    from nemo_dist.plugin.comm_estimate import ModelFacts, Traffic
    from nemo_dist.plugin.memory_estimate import RankShare

__all__ = ["Context", "ContextConfig"]


@attrs.frozen(eq=False)
class Context:
    """Split batches along the sequence, and compute attention over the whole sequence."""

    name: ClassVar[str] = "context"
    config_type: ClassVar[type] = ContextConfig
    stage: ClassVar[int] = Stage.CONTEXT
    axes: ClassVar[frozenset[str]] = frozenset({"cp"})
    composes_with: ClassVar[frozenset[str]] = frozenset()

    config: ContextConfig = attrs.field(factory=ContextConfig)

    @hookimpl
    def shard(self, parts: list[nn.Module], mesh: MeshContext) -> None:
        from nemo_dist_context.apply import apply_context_parallelism

        apply_context_parallelism([inner_model(part) for part in parts], mesh, self.config)

    @hookimpl
    def runtime(self, parts: list[nn.Module], mesh: MeshContext) -> RuntimePart | None:
        from nemo_dist_context.apply import runtime_part

        return None if mesh.size("cp") == 1 else runtime_part(inner_model(parts[0]), mesh, self.config)

    @hookimpl
    def explain(self, plan: MeshPlan, model: nn.Module | None) -> str:
        if plan.size("cp") == 1:
            return "context: nothing to do, cp_size is 1"
        where = "every attention"
        if model is not None:
            kinds = {type(module).__name__ for module in model.modules() if hasattr(module, "is_causal")}
            where = f"every {' and '.join(sorted(kinds))}"
        return f"context: sequences in {plan.size('cp')} parts, no module; {EXCHANGES[self.config.method]} in {where}"

    @hookimpl
    def traffic(self, plan: MeshPlan, facts: ModelFacts | None) -> list[Traffic]:
        from nemo_dist_context.comm_estimate import traffic

        return traffic(plan, facts, self.config)

    @hookimpl
    def memory(self, ranks: list[RankShare], plan: MeshPlan, model: nn.Module) -> None:
        size = plan.size("cp")
        if size == 1:
            return
        from nemo_dist_context.apply import require_fit
        from nemo_dist_context.sequence_layout import SequenceLayout

        proof = require_fit(model, self.config.method, size, plan.size("tp"))
        balanced = proof.causal if self.config.balance is None else self.config.balance
        layout = SequenceLayout(size=size, rank=0, balanced=balanced)
        for rank in ranks:
            rank.length = layout.padded(rank.length) // size
