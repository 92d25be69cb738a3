"""Replicate the model on every rank and average the gradients during the backward (torch's DistributedDataParallel)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import attrs

from nemo_dist import MeshPlan, RuntimePart, Stage, hookimpl
from nemo_dist.plugin.comm_estimate import Traffic, shared
from nemo_dist.plugin.options import boolean, integer, optional, options

if TYPE_CHECKING:
    from torch import nn

    from nemo_dist.mesh.mesh_context import MeshContext
    from nemo_dist.plugin.comm_estimate import ModelFacts


@options(plugin="ddp")
class DDPConfig:
    """Options of torch's ``DistributedDataParallel``, under its names and with its defaults.

    ``find_unused_parameters``: None turns it on for models of several towers, where a forward may leave some out.
    ``static_graph`` synchronises gradients after every batch of a list.
    ``bucket_cap_mb`` is the size of a gradient bucket in MiB. ``activation_checkpointing`` is the same as on
    ``DistributedSetup.build``; ``activation_checkpointing_scope`` restricts it to parts of a model of several towers:
    one or more of "language", "vision", "audio" and "multimodal"; None is all.
    """

    bucket_cap_mb: int = attrs.field(default=25, validator=integer(at_least=1))
    find_unused_parameters: bool | None = attrs.field(default=None, validator=optional(boolean))
    gradient_as_bucket_view: bool = attrs.field(default=False, validator=boolean)
    static_graph: bool = attrs.field(default=False, validator=boolean)
    broadcast_buffers: bool = attrs.field(default=True, validator=boolean)
    activation_checkpointing: bool | str = False
    activation_checkpointing_scope: str | Sequence[str] | None = None


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

    config: DDPConfig = attrs.field(factory=DDPConfig)

    @hookimpl
    def wrap(self, parts: list[nn.Module], mesh: MeshContext) -> None:
        from nemo_dist_ddp.replicas import replicate

        for part in parts:
            options = self._torch_options()
            if self.config.find_unused_parameters is None:
                options["find_unused_parameters"] = len(getattr(part.config, "sub_configs", ())) > 1
            replicate(part, mesh, options)

    @hookimpl
    def runtime(self, parts: list[nn.Module]) -> RuntimePart:
        from nemo_dist_ddp.replicas import unsynchronised

        # torch records a static graph in the first synchronised backward, and fails on an unsynchronised one before it.
        return RuntimePart(no_sync=None if self.config.static_graph else lambda: unsynchronised(parts))

    @hookimpl
    def explain(self, plan: MeshPlan) -> str:
        return f"ddp: {plan.size('dp')} replicas; gradients averaged in buckets of {self.config.bucket_cap_mb} MiB"

    @hookimpl
    def traffic(self, plan: MeshPlan, facts: ModelFacts | None) -> list[Traffic]:
        replicas = plan.size("dp")
        if replicas == 1:
            return []
        sent = None if facts is None else 2 * shared(replicas, facts.parameters * facts.stored)
        return [Traffic(axis="dp", collective="all-reduce", of="gradients, by bucket", often="once", sent=sent)]

    def _torch_options(self) -> dict[str, Any]:
        names = (
            "bucket_cap_mb",
            "find_unused_parameters",
            "gradient_as_bucket_view",
            "static_graph",
            "broadcast_buffers",
        )
        return {name: getattr(self.config, name) for name in names}
