"""Shard with NVIDIA's Megatron-FSDP: ZeRO 1, 2 and 3 over flat buckets, with overlapped communication, on CUDA."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import attrs

from nemo_dist import MeshPlan, RuntimePart, Stage, hookimpl
from nemo_dist.planning.validation import FrozenMapping
from nemo_dist.plugin.options import boolean, one_of, options
from nemo_dist_megatron_fsdp.version_check import problems

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nemo_dist.mesh.mesh_context import MeshContext

_SHARDED = {1: "optimizer state", 2: "optimizer state and gradients", 3: "optimizer state, gradients and parameters"}


def _class_names(value: Any) -> tuple[str, ...] | None:
    """Return the names as a tuple; refuse a string, which would be read as a list of letters."""
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"megatron_fsdp_unit_modules must be a list of class names (got {value!r})")
    names = tuple(value)
    for name in names:
        if not isinstance(name, str) or not name:
            raise TypeError(f"megatron_fsdp_unit_modules must be a list of class names (got {name!r} in it)")
    if not names:
        raise ValueError("megatron_fsdp_unit_modules is empty; name a class, or pass None for the model's own blocks")
    return names


def _frozen(value: Any) -> Any:
    return FrozenMapping(value) if isinstance(value, Mapping) else value


@options(plugin="megatron_fsdp")
class MegatronFSDPConfig:
    """Options of Megatron-FSDP, under NeMo's names.

    ``zero_dp_strategy``: 1 shards the optimizer state, 2 the gradients too, 3 the parameters too.
    ``megatron_fsdp_unit_modules``: names (``"LlamaDecoderLayer"``) or import paths of the classes that are gathered and
    freed as one; None takes the blocks that the model declares indivisible. ``preserve_fp32_weights``: keep and update
    float32 weights, and gradients, beside parameters of another dtype. ``grad_reduce_in_fp32``: reduce gradients in
    float32, whatever the dtype of the parameters. ``average_in_collective``: divide in the collective, not before it.
    ``overlap_param_gather``: gather a unit while the one before it computes; without, all of them before the forward.
    ``overlap_grad_reduce``: reduce gradients during the backward; without, after it. ``disable_bucketing``: one bucket
    for all parameters outside the units. ``fsdp_double_buffer``: gather and reduce in two buffers that are kept, for
    models whose units are alike. ``report_nan_in_param_grad``: raise on a gradient that is
    not finite (slow). ``activation_checkpointing`` is the same as on ``DistributedSetup.build``. ``sequence_parallel``
    and ``tp_plan`` go to the plugin of the ``tp`` axis, and are refused without one.
    """

    zero_dp_strategy: int = attrs.field(default=3, validator=one_of((1, 2, 3)))
    megatron_fsdp_unit_modules: tuple[str, ...] | None = attrs.field(default=None, converter=_class_names)
    preserve_fp32_weights: bool = attrs.field(default=True, validator=boolean)
    grad_reduce_in_fp32: bool = attrs.field(default=True, validator=boolean)
    average_in_collective: bool = attrs.field(default=False, validator=boolean)
    overlap_param_gather: bool = attrs.field(default=True, validator=boolean)
    overlap_grad_reduce: bool = attrs.field(default=True, validator=boolean)
    disable_bucketing: bool = attrs.field(default=False, validator=boolean)
    fsdp_double_buffer: bool = attrs.field(default=False, validator=boolean)
    report_nan_in_param_grad: bool = attrs.field(default=False, validator=boolean)
    activation_checkpointing: bool | str = False
    sequence_parallel: bool = attrs.field(default=False, validator=boolean)
    tp_plan: Mapping[str, str] | None = attrs.field(default=None, converter=_frozen)


def _impossible(config: MegatronFSDPConfig) -> list[str]:
    """Say which options the package would silently turn into others."""
    level, found = config.zero_dp_strategy, []
    if not config.overlap_param_gather and level == 3:
        found.append(
            "overlap_param_gather=False needs whole parameters, and with zero_dp_strategy=3 the package turns it on "
            "again; use zero_dp_strategy 1 or 2, or leave it True"
        )
    if not config.overlap_grad_reduce and level > 1:
        found.append(
            f"overlap_grad_reduce=False needs whole gradients, and with zero_dp_strategy={level} the package turns it "
            "on again; use zero_dp_strategy=1, or leave it True"
        )
    if not config.overlap_grad_reduce and config.grad_reduce_in_fp32 and not config.preserve_fp32_weights:
        found.append(
            "overlap_grad_reduce=False reduces gradients in the dtype that they are kept in, which with "
            "preserve_fp32_weights=False is that of the parameters; set grad_reduce_in_fp32=False or keep the weights"
        )
    if config.fsdp_double_buffer and level == 1:
        found.append(
            "fsdp_double_buffer=True has no buffers to reuse with zero_dp_strategy=1, which gathers and reduces in "
            "place; use zero_dp_strategy 2 or 3, or leave it False"
        )
    return found


@attrs.frozen(eq=False)
class MegatronFSDP:
    """Shard with NVIDIA's Megatron-FSDP: ZeRO 1, 2 or 3, on CUDA."""

    name: ClassVar[str] = "megatron_fsdp"
    config_type: ClassVar[type] = MegatronFSDPConfig
    stage: ClassVar[int] = Stage.DATA
    axes: ClassVar[frozenset[str]] = frozenset({"dp_shard"})
    composes_with: ClassVar[frozenset[str]] = frozenset({"activation_checkpointing", "cp", "tp"})
    delegates: ClassVar[Mapping[str, tuple[str, ...]]] = {"tp": ("tp_plan", "sequence_parallel")}

    config: MegatronFSDPConfig = attrs.field(factory=MegatronFSDPConfig)

    @hookimpl
    def validate(self, device_type: str | None) -> list[str]:
        found = [*problems(), *_impossible(self.config)]
        if device_type not in (None, "cuda"):
            found.append(f"strategy 'megatron_fsdp' needs CUDA (got device_type {device_type!r}); use 'fsdp2' there")
        return found

    @hookimpl
    def shard(self, parts: list[nn.Module], mesh: MeshContext) -> None:
        from nemo_dist_megatron_fsdp.sharding import refuse_device, shard_evenly

        refuse_device(mesh)
        for part in parts:
            shard_evenly(part, mesh)

    @hookimpl
    def wrap(self, parts: list[nn.Module], mesh: MeshContext) -> None:
        from nemo_dist_megatron_fsdp.sharding import take_over

        for part in parts:
            take_over(part, mesh, self.config)

    @hookimpl
    def runtime(self, parts: list[nn.Module], mesh: MeshContext) -> RuntimePart:
        from nemo_dist_megatron_fsdp.engine import Engine

        engines = [Engine.of(part) for part in parts]
        return RuntimePart(
            no_sync=lambda: Engine.unsynchronised(engines),
            lockstep=mesh.size("dp_cp") > 1,
            optimizer=engines[0].adopt,
        )

    @hookimpl
    def export_state(self, state: dict[str, Tensor], parts: list[nn.Module]) -> None:
        from nemo_dist_megatron_fsdp.engine import Engine

        for part in parts:
            Engine.of(part).layout.to_even(state)

    @hookimpl
    def import_state(self, state: dict[str, Tensor], parts: list[nn.Module]) -> None:
        from nemo_dist_megatron_fsdp.engine import Engine

        for part in parts:
            Engine.of(part).layout.from_even(state)

    @hookimpl
    def explain(self, plan: MeshPlan) -> str:
        level, shards = self.config.zero_dp_strategy, plan.size("dp_shard_cp")
        return f"megatron_fsdp: ZeRO {level}, {_SHARDED[level]} in {shards} shards; parameters gathered by block"
