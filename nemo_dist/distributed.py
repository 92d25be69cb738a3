"""The same public names under the path that a migration by search and replace arrives at."""

from __future__ import annotations

from typing import Any

import nemo_dist

__all__ = list(nemo_dist.__all__)


def __getattr__(name: str) -> Any:
    return getattr(nemo_dist, name)
