"""The precision of tests that compare numbers with those of one process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

# For ``mp_policy`` of a strategy: compute, reduce and return outputs in float32, for small rounding errors.
FP32: Final[Mapping[str, str]] = {"param_dtype": "float32", "reduce_dtype": "float32", "output_dtype": "float32"}
