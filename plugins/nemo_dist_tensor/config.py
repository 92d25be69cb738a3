"""The options of tensor parallelism; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import attrs

from nemo_dist.planning.validation import FrozenMapping
from nemo_dist.plugin.options import boolean, options, tp_rules


def _rules(value: Any) -> FrozenMapping[str]:
    """Return the frozen mapping from module names to styles that a config holds."""
    return FrozenMapping() if value is None else tp_rules(value)


@options(plugin="tensor")
class TensorConfig:
    """Options of tensor parallelism; a strategy that has the same options passes its values on.

    ``tp_plan``: rules that override the model's own, each from a module name (``"layers.*.mlp.up_proj"``) to a style
    (``"colwise"``); see ``nemo_dist_tensor.styles``. ``sequence_parallel``: between attention and feed-forward every
    rank holds only its own tokens. ``enable_async_tensor_parallel``: overlap its collectives with the matrix products
    around them; refused, with the reason, where that is not proven.
    """

    worth_trying: ClassVar[Mapping[str, tuple[Any, ...]]] = {"sequence_parallel": (False, True)}

    tp_plan: Mapping[str, str] | None = attrs.field(default=None, converter=_rules)
    sequence_parallel: bool = attrs.field(default=False, validator=boolean)
    enable_async_tensor_parallel: bool = attrs.field(default=False, validator=boolean)
