"""Shard parameters, gradients and optimizer state over the data-parallel ranks (torch's ``fully_shard``), with HSDP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import attrs

from nemo_dist import MeshPlan, RuntimePart, Stage, hookimpl
from nemo_dist.planning.validation import FrozenMapping
from nemo_dist.plugin.comm_estimate import Traffic, bytes_of, shared
from nemo_dist.plugin.mixed_precision import mixed_precision_fields
from nemo_dist.plugin.options import boolean, integer, options
from nemo_dist_fsdp2.policies import offload_fields

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy

    from nemo_dist.mesh.mesh_context import MeshContext
    from nemo_dist.plugin.comm_estimate import ModelFacts

_POLICY = ("param_dtype", "reduce_dtype")


def _reshard(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if value is not None and not isinstance(value, bool):
        integer(at_least=2)(instance, attribute, value)


def _frozen(value: Any) -> Any:
    """Return a frozen copy of a plan; the plugin of the ``tp`` axis checks what is in it."""
    return FrozenMapping(value) if isinstance(value, dict) else value


@options(plugin="fsdp2")
class FSDP2Config:
    """Options of FSDP2.

    ``mp_policy``: torch's ``MixedPrecisionPolicy``, or its fields as a dict of dtype names; None computes in bfloat16
    and reduces gradients in float32. ``offload_policy``: torch's ``CPUOffloadPolicy``, or "cpu", or its ``pin_memory``
    in a dict; None keeps the shards on the device. ``reshard_after_forward``: free the gathered parameters of a block
    after its forward; an int reshards to that many ranks; None is True for blocks, but False for what the end of the
    forward needs and in the stages of a pipeline. ``defer_fsdp_grad_sync``: reduce gradients once per
    ``forward_backward``, not once per batch of a list (faster, but holds whole gradients).
    ``forward_prefetch_depth``, ``backward_prefetch_depth``: how many blocks ahead are gathered.
    ``enable_compile``: run ``torch.compile`` on every block. ``activation_checkpointing`` is the same as on
    ``DistributedSetup.build``; ``activation_checkpointing_scope`` restricts it to parts of a model of several towers:
    one or more of "language", "vision", "audio" and "multimodal"; None is all. ``sequence_parallel``, ``tp_plan`` and
    ``enable_async_tensor_parallel`` go to the plugin of the ``tp`` axis, and are refused without one.
    """

    mp_policy: MixedPrecisionPolicy | dict[str, Any] | None = attrs.field(
        default=None, converter=mixed_precision_fields
    )
    offload_policy: OffloadPolicy | dict[str, Any] | str | None = attrs.field(default=None, converter=offload_fields)
    reshard_after_forward: bool | int | None = attrs.field(default=None, validator=_reshard)
    defer_fsdp_grad_sync: bool = attrs.field(default=True, validator=boolean)
    forward_prefetch_depth: int = attrs.field(default=1, validator=integer(at_least=1))
    backward_prefetch_depth: int = attrs.field(default=1, validator=integer(at_least=1))
    enable_compile: bool = attrs.field(default=False, validator=boolean)
    activation_checkpointing: bool | str = False
    sequence_parallel: bool = attrs.field(default=False, validator=boolean)
    tp_plan: Mapping[str, str] | None = attrs.field(default=None, converter=_frozen)
    enable_async_tensor_parallel: bool = attrs.field(default=False, validator=boolean)
    activation_checkpointing_scope: str | Sequence[str] | None = None


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
        "tp": ("tp_plan", "sequence_parallel", "enable_async_tensor_parallel")
    }

    config: FSDP2Config = attrs.field(factory=FSDP2Config)

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
        from nemo_dist_fsdp2.sharding import shard

        for part in parts:
            shard(part, mesh, self.config)

    @hookimpl
    def runtime(self, parts: list[nn.Module], mesh: MeshContext) -> RuntimePart:
        from nemo_dist_fsdp2.sharding import unsynchronised

        return RuntimePart(
            no_sync=(lambda: unsynchronised(parts)) if self.config.defer_fsdp_grad_sync else None,
            lockstep=mesh.size("dp_cp") > 1,
        )

    @hookimpl
    def explain(self, plan: MeshPlan, model: nn.Module | None) -> str:
        replicas = plan.size("dp_replicate")
        line = f"fsdp2: parameters, gradients and optimizer state in {plan.size('dp_shard_cp')} shards"
        line += f", each on {replicas} replicas" if replicas > 1 else ""
        if model is None:
            return line
        from nemo_dist_fsdp2.sharding import described

        return f"{line}; gathered one by one: {described(model)}"

    @property
    def compute_dtype(self) -> str | None:
        """The name of the dtype of parameters in a forward; None is the dtype that they are stored in."""
        return self._dtypes[0]

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
        shards, replicas = plan.size("dp_shard_cp"), plan.size("dp_replicate")
        if shards == 1:
            return []
        reshard = (
            plan.size("pp") == 1 if self.config.reshard_after_forward is None else self.config.reshard_after_forward
        )
        again = ", and again in the backward those of blocks and embedding" if reshard else ""
        gathered = reduced = averaged = None
        if facts is not None:
            part = plan.size("tp") * plan.size("pp")
            elsewhere = facts.expert_parameters if any("ep" in view for view in plan.views) else 0  # counted there
            here = facts.parameters - elsewhere
            twice = facts.block_parameters - elsewhere + facts.embedding_parameters if reshard else 0
            gathered = shared(shards, (here + twice) * facts.computed / part)
            reduction = self._dtypes[1]
            size = bytes_of(reduction) if reduction else facts.stored
            reduced = shared(shards, here * size / part)
            averaged = 2 * shared(replicas, here * size / part / shards)
        found = [
            Traffic(
                axis="dp_shard_cp",
                collective="all-gather",
                of="parameters, by block",
                often=f"once{again}",
                sent=gathered,
            ),
            Traffic(
                axis="dp_shard_cp", collective="reduce-scatter", of="gradients, by block", often="once", sent=reduced
            ),
        ]
        copies = Traffic(
            axis="dp_replicate", collective="all-reduce", of="gradient shards", often="once", sent=averaged
        )
        return [*found, copies] if replicas > 1 else found
