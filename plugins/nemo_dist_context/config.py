"""The options of context parallelism; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import attrs

from nemo_dist.plugin.options import boolean, one_of, options

EXCHANGES = {
    "all_gather": "all-gather of keys and values",
    "ulysses": "all-to-all of heads",
}


def _method(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if value == "ring":
        raise ValueError(
            "ContextConfig.method 'ring' is not supported: torch's ring attention needs CUDA kernels, and nothing here "
            "proves it equal to one process; use 'all_gather' or 'ulysses'"
        )
    one_of(tuple(EXCHANGES))(instance, attribute, value)


@options(plugin="context")
class ContextConfig:
    """How the ranks of ``cp`` compute attention together; pass it as ``plugins=(ContextConfig(...),)``.

    ``method``: "all_gather" gathers all keys and values on every rank, layer by layer, as Llama 3 was trained
    (arXiv:2407.21783); it works with any number of heads. "ulysses" exchanges parts of the sequence for parts of the
    heads (DeepSpeed-Ulysses, arXiv:2309.14509); heads must divide. ``balance``: give every rank a chunk from the start
    and one from the end of a sequence, so that causal attention is equal work for all; None is True for causal models.
    """

    worth_trying: ClassVar[Mapping[str, tuple[Any, ...]]] = {"method": tuple(EXCHANGES)}

    method: str = attrs.field(default="all_gather", validator=_method)
    balance: bool | None = attrs.field(default=None, validator=attrs.validators.optional(boolean))
