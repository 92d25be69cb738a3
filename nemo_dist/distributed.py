"""Alias of the public names of ``nemo_dist``, for code that imports them from ``nemo_dist.distributed``."""

from __future__ import annotations

from typing import Any

import nemo_dist

__all__ = list(nemo_dist.__all__)


def __getattr__(name: str) -> Any:
    return getattr(nemo_dist, name)
