"""The options of context parallelism; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import attrs

from nemo_dist.plugin.options import boolean, one_of, options

EXCHANGES = {
    "all_gather": "all-gather of keys and values",
    "ulysses": "all-to-all of heads",
    "ring": "keys and values go round",
}


@options(plugin="context")
class ContextConfig:
    """How the ranks of ``cp`` compute attention together; pass it as ``plugins=(ContextConfig(...),)``.

    ``method``: "all_gather" gathers all keys and values on every rank, layer by layer, as Llama 3 was trained
    (arXiv:2407.21783); it works with any number of heads. "ulysses" exchanges parts of the sequence for parts of the
    heads (DeepSpeed-Ulysses, arXiv:2309.14509); heads must divide. "ring" passes keys and values from rank to rank
    (arXiv:2310.01889), so that no rank holds all of them; layers with a mask (padding, packing, windows), with dropout
    or with eager attention gather them. ``balance``: give every rank a chunk from the start and one from the end of a
    sequence, so that causal attention is equal work for all; None is True for causal models.
    """

    worth_trying: ClassVar[Mapping[str, tuple[Any, ...]]] = {"method": ("all_gather", "ulysses")}

    method: str = attrs.field(default="all_gather", validator=one_of(tuple(EXCHANGES)))
    balance: bool | None = attrs.field(default=None, validator=attrs.validators.optional(boolean))
