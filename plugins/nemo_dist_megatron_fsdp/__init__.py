"""Shard with NVIDIA's Megatron-FSDP: ZeRO 1, 2 and 3 over flat buckets, with overlapped communication, on CUDA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import attrs

from nemo_dist import MeshPlan, Role, RuntimePart, Stage, hookimpl
from nemo_dist.hf_model import inner_model
from nemo_dist_megatron_fsdp.config import MegatronFSDPConfig, impossible
from nemo_dist_megatron_fsdp.version_check import problems

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nemo_dist.mesh.mesh_context import MeshContext
    from nemo_dist.plugin.comm_estimate import ModelFacts, Traffic
    from nemo_dist.plugin.memory_estimate import RankShare

_SHARDED = ("optimizer state", "gradients", "parameters")  # ZeRO 1 shards the first, 2 the second too, 3 all

__all__ = ["MegatronFSDP", "MegatronFSDPConfig"]


@attrs.frozen(eq=False)
class MegatronFSDP:
    """Shard with NVIDIA's Megatron-FSDP: ZeRO 1, 2 or 3, on CUDA."""

    name: ClassVar[str] = "megatron_fsdp"
    config_type: ClassVar[type] = MegatronFSDPConfig
    stage: ClassVar[int] = Stage.DATA
    axes: ClassVar[frozenset[str]] = frozenset({"dp_shard"})
    composes_with: ClassVar[frozenset[str]] = frozenset({"activation_checkpointing", "cp", "tp"})
    delegates: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "activation_checkpointing": ("activation_checkpointing",),
        "tp": ("tp_plan", "sequence_parallel"),
    }

    config: MegatronFSDPConfig = attrs.field(factory=MegatronFSDPConfig)

    @hookimpl
    def validate(self, plan: MeshPlan, device_type: str | None) -> list[str]:
        found = [*problems(), *impossible(self.config)]
        for axis in plan.dense.splitting(Role.BATCH):
            if axis not in self.axes and axis != "dp_replicate" and plan.size(axis) > 1:
                found.append(
                    f"axis {axis!r} splits the batch {plan.size(axis)} ways, but megatron_fsdp averages gradients over "
                    "dp_shard and cp only; use 'fsdp2'"
                )
        if device_type not in (None, "cuda"):
            found.append(f"strategy 'megatron_fsdp' needs CUDA (got device_type {device_type!r}); use 'fsdp2' there")
        return found

    @hookimpl
    def shard(self, parts: list[nn.Module], mesh: MeshContext) -> None:
        from nemo_dist_megatron_fsdp.sharding import refuse_device, shard_evenly

        refuse_device(mesh)
        for part in parts:
            shard_evenly(inner_model(part), mesh)

    @hookimpl
    def wrap(self, parts: list[nn.Module], mesh: MeshContext) -> None:
        from nemo_dist_megatron_fsdp.sharding import take_over

        for part in parts:
            take_over(inner_model(part), mesh, self.config)

    @hookimpl
    def runtime(self, parts: list[nn.Module], mesh: MeshContext) -> RuntimePart:
        from nemo_dist_megatron_fsdp.engine import Engine

        engines = [Engine.of(inner_model(part)) for part in parts]
        return RuntimePart(
            no_sync=lambda: Engine.unsynchronised(engines),
            lockstep=mesh.size(Role.TOKENS) > 1,
            optimizer=engines[0].adopt,
            unreduced=lambda: {one: drop for engine in engines for one, drop in engine.unreduced().items()},
        )

    @hookimpl
    def export_state(self, state: dict[str, Tensor], parts: list[nn.Module]) -> None:
        from nemo_dist_megatron_fsdp.engine import Engine

        for part in parts:
            Engine.of(inner_model(part)).layout.to_even(state)

    @hookimpl
    def import_state(self, state: dict[str, Tensor], parts: list[nn.Module]) -> None:
        from nemo_dist_megatron_fsdp.engine import Engine

        for part in parts:
            Engine.of(inner_model(part)).layout.from_even(state)

    @hookimpl
    def traffic(self, plan: MeshPlan, facts: ModelFacts | None) -> list[Traffic]:
        from nemo_dist_megatron_fsdp.comm_estimate import traffic

        return traffic(plan, facts, self.config)

    @hookimpl
    def memory(self, ranks: list[RankShare], plan: MeshPlan, model: nn.Module) -> None:
        from nemo_dist_megatron_fsdp.memory_estimate import hold

        hold(ranks, plan.size("dp_shard_cp"), plan.size("tp"), self.config, model)

    @hookimpl
    def explain(self, plan: MeshPlan) -> str:
        level, shards = self.config.zero_dp_strategy, plan.size("dp_shard_cp")
        what = " and ".join(", ".join(_SHARDED[:level]).rsplit(", ", 1))
        return f"megatron_fsdp: ZeRO {level}, {what} in {shards} shards; parameters gathered by block"
