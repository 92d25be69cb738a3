"""Replicate the model on every rank and average the gradients during the backward (torch's DistributedDataParallel)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import attrs

from nemo_dist import MeshPlan, Role, RuntimePart, Stage, hookimpl
from nemo_dist.hf_model import inner_model
from nemo_dist_ddp.config import DDPConfig

if TYPE_CHECKING:
    from torch import nn

    from nemo_dist.mesh.mesh_context import MeshContext
    from nemo_dist.plugin.comm_estimate import ModelFacts, Traffic
    from nemo_dist.plugin.memory_estimate import RankShare

__all__ = ["DDP", "DDPConfig"]


@attrs.frozen(eq=False)
class DDP:
    """Replicate the model; average gradients during the backward."""

    name: ClassVar[str] = "ddp"
    config_type: ClassVar[type] = DDPConfig
    stage: ClassVar[int] = Stage.DATA
    axes: ClassVar[frozenset[str]] = frozenset({"dp_shard"})
    composes_with: ClassVar[frozenset[str]] = frozenset(
        {"activation_checkpointing", "activation_checkpointing:selective", "adapters"}
    )

    delegates: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "activation_checkpointing": ("activation_checkpointing", "activation_checkpointing_scope")
    }

    config: DDPConfig = attrs.field(factory=DDPConfig)

    @hookimpl
    def wrap(self, parts: list[nn.Module], mesh: MeshContext) -> None:
        from nemo_dist_ddp.replicas import replicate

        for model in map(inner_model, parts):
            options = self._torch_options()
            if self.config.find_unused_parameters is None:
                # Many models have parameters that no loss reaches (an indexer, a pooler, experts of a layer without
                # any), and nothing in their structure says so; torch would leave gradients beside them unreduced.
                options["find_unused_parameters"] = not self.config.static_graph
            replicate(model, mesh, options)

    @hookimpl
    def runtime(self, parts: list[nn.Module]) -> RuntimePart:
        from nemo_dist_ddp.replicas import forward_to_loss, unreduced, unsynchronised

        # torch records a static graph in the first synchronised backward, and fails on an unsynchronised one before it.
        return RuntimePart(
            no_sync=None if self.config.static_graph else lambda: unsynchronised([inner_model(part) for part in parts]),
            unreduced=lambda: unreduced([inner_model(part) for part in parts]),
            forward_to_loss=partial(forward_to_loss, inner_model(parts[0])),
        )

    @hookimpl
    def explain(self, plan: MeshPlan) -> str:
        replicas, size = plan.splitting(Role.TOKENS), self.config.bucket_cap_mb
        return f"ddp: {replicas} replicas; gradients averaged in buckets of {size} MiB"

    @hookimpl
    def traffic(self, plan: MeshPlan, facts: ModelFacts | None) -> list[Traffic]:
        replicas = plan.splitting(Role.TOKENS)  # with the axes of other plugins
        if replicas == 1:
            return []
        from nemo_dist.plugin.comm_estimate import Traffic, shared

        axis = "dp" if plan.size("dp") == replicas else "dp_cp"
        every = self.config.static_graph
        often = "once for every batch of a list" if every else "once"
        sent = None
        if facts is not None:
            trained = facts.trained * facts.stored  # adapters, which its buckets take too, have a line of their own
            sent = 2 * shared(replicas, trained) * (facts.batches if every else 1)
        return [Traffic(axis=axis, collective="all-reduce", of="gradients, by bucket", often=often, sent=sent)]

    @hookimpl
    def memory(self, ranks: list[RankShare]) -> None:
        for rank in ranks:  # torch keeps buckets for all gradients, and with views none beside them
            rank.bytes["gradient buckets"] = 0 if self.config.gradient_as_bucket_view else rank.states["gradients"]

    def _torch_options(self) -> dict[str, Any]:
        names = (
            "bucket_cap_mb",
            "find_unused_parameters",
            "gradient_as_bucket_view",
            "static_graph",
            "broadcast_buffers",
        )
        return {name: getattr(self.config, name) for name in names}
