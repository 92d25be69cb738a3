"""The precision of tests that compare numbers with those of one process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from nemo_dist.plugin.options import accepted_names
from nemo_dist.plugin.registry import Registry

# For ``mp_policy`` of a strategy: compute, reduce and return outputs in float32, for small rounding errors.
FP32: Final[Mapping[str, str]] = {"param_dtype": "float32", "reduce_dtype": "float32", "output_dtype": "float32"}


def in_float32(strategy: str) -> Any:
    """Return what selects the installed *strategy* so that it computes in float32: a config, or its name."""
    kind: Any = Registry().load(strategy).config_type
    has_policy = hasattr(kind, "__attrs_attrs__") and "mp_policy" in accepted_names(kind)
    return kind(mp_policy=FP32) if has_policy else strategy
