"""The options of expert parallelism; no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from nemo_dist.plugin.mixed_precision import dtype_name, mixed_precision_fields
from nemo_dist.plugin.options import Fixed, boolean, one_of, options

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy

# The axes of ep_shard where there are replicas: between the replicas, and within each.
BETWEEN, WITHIN = "ep_between_replicas", "ep_within_replica"
_DISPATCHERS = ("auto", "all_to_all", "all_reduce")
_PRECISIONS = ("float32", "bfloat16", "float16")


_FIXED = {
    "ignore_router_for_ac": Fixed(values=(True, False), instead="recomputing a router gives the same, leave it out"),
    "wrap_outer_model": Fixed(values=(True, False), instead="the strategy shards the whole model, leave it out"),
}


@options(plugin="moe", fixed=_FIXED)
class MoEParallelizerConfig:
    """Options of expert parallelism.

    ``dispatcher``: ``"all_to_all"`` sends every token to the ranks of its experts; ``"all_reduce"`` runs the local
    experts on all tokens and sums the outputs, which needs ranks that hold the same tokens (ep = tp); ``"auto"`` takes
    the first in training, the second where no gradient is needed. ``reshard_after_forward``: free the gathered experts
    of a block after its forward; None does as the strategy does. ``mp_policy``: the dtypes for the experts, in place of
    the strategy's; torch's ``MixedPrecisionPolicy`` or its fields as a dict of dtype names. ``lm_head_precision``: the
    dtype to compute the output head in, "float32" say; None is the strategy's.
    """

    dispatcher: str = attrs.field(default="auto", validator=one_of(_DISPATCHERS))
    reshard_after_forward: bool | None = attrs.field(default=None, validator=attrs.validators.optional(boolean))
    mp_policy: MixedPrecisionPolicy | dict[str, Any] | None = attrs.field(
        default=None, converter=mixed_precision_fields
    )
    lm_head_precision: str | None = attrs.field(
        default=None,
        converter=dtype_name,
        validator=attrs.validators.optional(one_of(_PRECISIONS)),
    )
