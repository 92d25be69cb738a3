"""The options of DistributedDataParallel; no torch."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from nemo_dist.plugin.options import Fixed, boolean, integer, options

_FIXED = {"autocast_dtype": Fixed(values=(None,), instead="ddp computes in the dtype that the model is loaded in")}


@options(plugin="ddp", fixed=_FIXED)
class DDPConfig:
    """Options of torch's ``DistributedDataParallel``, under its names and, but for two, with its defaults.

    ``find_unused_parameters``: None turns it on, as many models have parameters that a loss does not reach; False saves
    a walk over the graph in every step, and is for models whose every parameter gets a gradient in every batch.
    ``static_graph`` synchronises gradients after every batch of a list.
    ``bucket_cap_mb`` is the size of a gradient bucket in MiB, for None torch's 25. ``gradient_as_bucket_view`` lets
    gradients be views of the buckets, which saves their memory once. ``broadcast_buffers`` sends the buffers of the
    first rank to all before the first forward of a step; off here, as a buffer that a forward writes for its own batch
    (frequencies of a length, say) is wrong for that of another rank. ``activation_checkpointing``
    is the same as on ``DistributedSetup.build``; ``activation_checkpointing_scope`` restricts it to parts of a model of
    several towers: one or more of "language", "vision", "audio" and "multimodal"; None is all.
    """

    bucket_cap_mb: int = attrs.field(
        default=25, converter=attrs.converters.default_if_none(25), validator=integer(at_least=1)
    )
    find_unused_parameters: bool | None = attrs.field(default=None, validator=attrs.validators.optional(boolean))
    gradient_as_bucket_view: bool = attrs.field(default=False, validator=boolean)
    static_graph: bool = attrs.field(default=False, validator=boolean)
    broadcast_buffers: bool = attrs.field(default=False, validator=boolean)
    activation_checkpointing: bool | str = False
    activation_checkpointing_scope: str | Sequence[str] | None = None
