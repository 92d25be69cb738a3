"""The options of FSDP2; no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from nemo_dist.plugin.mixed_precision import mixed_precision_fields
from nemo_dist.plugin.options import Fixed, boolean, integer, options, tp_rules
from nemo_dist_fsdp2.policies import offload_fields

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy


def _reshard(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if value is not None and not isinstance(value, bool):
        integer(at_least=2)(instance, attribute, value)


_FIXED = {
    "patch_is_packed_sequence": Fixed(values=(False,), instead="transformers is not patched, leave it out"),
    "autocast_dtype": Fixed(values=(None,), instead="say what a forward computes in with mp_policy"),
    "enable_fsdp2_prefetch": Fixed(values=(False, True), instead="blocks are gathered ahead by the prefetch depths"),
    "multimodal": Fixed(
        values=(None, {}, {"frozen_sharding": "root"}, {"frozen_sharding": "per_layer"}),
        instead="frozen towers are sharded like the rest, and every rank computes all of its images",
    ),
}
_RENAMED = {
    "fsdp2_forward_prefetch_depth": "forward_prefetch_depth",
    "fsdp2_backward_prefetch_depth": "backward_prefetch_depth",
}


@options(plugin="fsdp2", fixed=_FIXED, renamed=_RENAMED)
class FSDP2Config:
    """Options of FSDP2.

    ``mp_policy``: torch's ``MixedPrecisionPolicy``, or its fields as a dict of dtype names; None computes in bfloat16
    and reduces gradients in float32. Parameters that transformers keeps in float32 are computed in it. With None, or a
    dict without ``cast_forward_inputs``, only activations among the inputs of the model are cast (embeddings, pixels,
    features; no labels, no masks), and its outputs, and its modules get from each other what they do on one process;
    torch's object, or True, casts all floating tensors, and those of every block, as torch does.
    ``offload_policy``: torch's ``CPUOffloadPolicy``, or "cpu", or its ``pin_memory``
    in a dict; None keeps the shards on the device. ``reshard_after_forward``: free the gathered parameters of a block
    after its forward; an int reshards to that many ranks; None is True for blocks, but False for what the end of the
    forward needs and in the stages of a pipeline. ``defer_fsdp_grad_sync``: reduce gradients once per
    ``forward_backward``, not once per batch of a list (faster, but holds whole gradients).
    ``forward_prefetch_depth``, ``backward_prefetch_depth``: how many blocks ahead are gathered.
    ``enable_compile``: run ``torch.compile`` on every block; a warning names those of which it compiles nothing.
    ``activation_checkpointing`` is the same as on ``DistributedSetup.build``; ``activation_checkpointing_scope``
    restricts it to parts of a model of several towers: one or more of "language", "vision", "audio" and "multimodal";
    None is all. ``sequence_parallel``, ``tp_plan`` and ``enable_async_tensor_parallel`` go to the plugin of the ``tp``
    axis, and are refused without one.
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
    tp_plan: Mapping[str, str] | None = attrs.field(default=None, converter=tp_rules)
    enable_async_tensor_parallel: bool = attrs.field(default=False, validator=boolean)
    activation_checkpointing_scope: str | Sequence[str] | None = None
