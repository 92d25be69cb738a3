"""The options of Megatron-FSDP; no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from nemo_dist.planning.validation import shown
from nemo_dist.plugin.options import Fixed, boolean, one_of, options, tp_rules


def _class_names(value: Any) -> tuple[str, ...] | None:
    """Return the names as a tuple; refuse a string, which would be read as a list of letters."""
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"megatron_fsdp_unit_modules must be a list of class names (got {shown(value)})")
    names = tuple(value)
    for name in names:
        if not isinstance(name, str) or not name:
            raise TypeError(f"megatron_fsdp_unit_modules must be a list of class names (got {shown(name)} in it)")
    if not names:
        raise ValueError("megatron_fsdp_unit_modules is empty; name a class, or pass None for the model's own blocks")
    return names


_FIXED = {
    "init_fsdp_with_meta_device": Fixed(values=(False,), instead="the loader makes the model, leave it out"),
    "check_for_nan_in_grad": Fixed(values=(True, False), instead="it does nothing, use report_nan_in_param_grad"),
    "calculate_per_token_loss": Fixed(values=(False,), instead="losses are weighted by tokens already, leave it out"),
    "keep_fp8_transpose_cache": Fixed(values=(False,), instead="nothing is computed in FP8, leave it out"),
    "nccl_ub": Fixed(values=(False,), instead="NCCL's user buffers are not proven, leave it out"),
}


@options(plugin="megatron_fsdp", fixed=_FIXED)
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
    tp_plan: Mapping[str, str] | None = attrs.field(default=None, converter=tp_rules)


def impossible(config: MegatronFSDPConfig) -> list[str]:
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
