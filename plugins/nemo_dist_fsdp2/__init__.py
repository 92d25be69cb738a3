"""Shard parameters, gradients and optimizer state over the data-parallel ranks (torch's ``fully_shard``), with HSDP."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import attrs

from nemo_dist import MeshPlan, Role, RuntimePart, Stage, hookimpl
from nemo_dist.hf_model import inner_model
from nemo_dist.plugin.comm_estimate import bytes_of, readable
from nemo_dist_fsdp2.config import FSDP2Config

if TYPE_CHECKING:
    from torch import nn

    from nemo_dist.mesh.mesh_context import MeshContext
    from nemo_dist.plugin.comm_estimate import ModelFacts, Traffic
    from nemo_dist.plugin.memory_estimate import RankShare

_POLICY = ("param_dtype", "reduce_dtype")

__all__ = ["FSDP2", "FSDP2Config"]


@attrs.frozen(eq=False)
class FSDP2:
    """Shard parameters, gradients and optimizer state; replicate the shards for HSDP."""

    name: ClassVar[str] = "fsdp2"
    config_type: ClassVar[type] = FSDP2Config
    stage: ClassVar[int] = Stage.DATA
    axes: ClassVar[frozenset[str]] = frozenset({"dp_shard", "dp_replicate"})
    composes_with: ClassVar[frozenset[str]] = frozenset(
        {"activation_checkpointing", "activation_checkpointing:selective", "adapters", "cp", "ep", "pp", "tp"}
    )
    delegates: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "activation_checkpointing": ("activation_checkpointing", "activation_checkpointing_scope"),
        "tp": ("tp_plan", "sequence_parallel", "enable_async_tensor_parallel"),
    }

    config: FSDP2Config = attrs.field(factory=FSDP2Config)

    @property
    def features(self) -> Mapping[str, str]:
        """What other plugins may not be proven with, each with the option that asked for it."""
        reshard = self.config.reshard_after_forward
        asked = {
            "compile": "enable_compile" if self.config.enable_compile else "",
            "offload": "offload_policy" if self.config.offload_policy is not None else "",
            "reshard_after_forward": "reshard_after_forward" if reshard else "",
            "reduce_every_backward": "" if self.config.defer_fsdp_grad_sync else "defer_fsdp_grad_sync=False",
        }
        return {feature: option for feature, option in asked.items() if option}

    @hookimpl
    def validate(self, plan: MeshPlan) -> list[str]:
        reshard, shards = self.config.reshard_after_forward, plan.size("dp_shard_cp")
        if isinstance(reshard, bool) or reshard is None or (shards % reshard == 0 and reshard < shards):
            return []
        return [
            f"reshard_after_forward={reshard} must divide the {shards} ranks that share the parameters and be less; "
            "use True to reshard to all of them"
        ]

    @hookimpl
    def shard(self, parts: list[nn.Module], mesh: MeshContext) -> None:
        from nemo_dist_fsdp2.sharding import refuse_offload_without_cpu_backend, shard

        if self.config.offload_policy is not None:
            refuse_offload_without_cpu_backend()
        for part in parts:
            shard(inner_model(part), mesh, self.config)

    @hookimpl
    def runtime(self, parts: list[nn.Module], mesh: MeshContext) -> RuntimePart:
        from nemo_dist_fsdp2.groups import groups_of, unreduced
        from nemo_dist_fsdp2.sharding import unsynchronised

        groups = [group for part in parts for group in groups_of(inner_model(part))]
        return RuntimePart(
            no_sync=(lambda: unsynchronised([inner_model(part) for part in parts]))
            if self.config.defer_fsdp_grad_sync
            else None,
            unreduced=partial(unreduced, groups),
            lockstep=mesh.size(Role.TOKENS) > 1,
        )

    @hookimpl
    def explain(self, plan: MeshPlan, model: nn.Module | None) -> str:
        from nemo_dist_fsdp2.comm_estimate import replica_axis

        replicas = plan.size(replica_axis(plan))
        line = f"fsdp2: parameters, gradients and optimizer state in {plan.size('dp_shard_cp')} shards"
        line += f", each on {replicas} replicas" if replicas > 1 else ""
        if model is None:
            return line
        from nemo_dist_fsdp2.sharding import described

        return f"{line}; gathered one by one: {described(model)}{self._deferred(plan, model)}"

    def _deferred(self, plan: MeshPlan, model: nn.Module) -> str:
        """Say how much memory the gradients take that wait for the last of several batches."""
        if not self.config.defer_fsdp_grad_sync:
            return ""
        dtype = self._dtypes[1]
        trained = [one for one in model.parameters() if one.requires_grad]
        if not trained:
            return ""
        whole = sum(one.numel() * (bytes_of(dtype) if dtype else one.itemsize) for one in trained)
        here = readable(whole // plan.size("tp") // plan.size("pp"))
        return (
            f"; a list of batches holds whole gradients until the last one is done, up to {here} on a rank "
            "(defer_fsdp_grad_sync=False reduces them after each)"
        )

    @property
    def compute_dtype(self) -> str | None:
        """The name of the dtype of parameters in a forward; None is the dtype that they are stored in."""
        return self._dtypes[0]

    @property
    def parameter_device(self) -> str | None:
        """The type of the device that keeps the shards; None is that of the mesh."""
        return None if self.config.offload_policy is None else "cpu"

    @property
    def _dtypes(self) -> tuple[str | None, str | None]:
        """The names of the dtypes of compute and of reduction."""
        if self.config.mp_policy is None:
            return "bfloat16", "float32"
        given: Any = self.config.mp_policy
        names = [given.get(name) if isinstance(given, Mapping) else getattr(given, name) for name in _POLICY]
        compute, reduction = (None if name is None else str(name).removeprefix("torch.") for name in names)
        return compute, reduction or compute

    @hookimpl
    def traffic(self, plan: MeshPlan, facts: ModelFacts | None) -> list[Traffic]:
        from nemo_dist_fsdp2.comm_estimate import traffic

        config = self.config
        return traffic(plan, facts, config.reshard_after_forward, self._dtypes[1], config.defer_fsdp_grad_sync)

    @hookimpl
    def memory(self, ranks: list[RankShare], plan: MeshPlan, model: nn.Module) -> None:
        from nemo_dist_fsdp2.memory_estimate import hold

        hold(ranks, plan, self.config, self._dtypes, model)
