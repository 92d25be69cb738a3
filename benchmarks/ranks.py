"""Fresh gloo ranks for one measurement."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

from nemo_dist.testing import RankPool


def on_ranks(world: int, function: Callable[..., Any], *args: Any, timeout: float = 300) -> list[Any]:
    """Return what *function* of *args* returns on each of *world* new processes; they end with the call.

    Every rank computes on one thread. What the ranks print (torch's warnings, mostly) is dropped unless one fails.
    """
    with redirect_stdout(io.StringIO()), RankPool(world, timeout=timeout, collective_timeout=timeout) as pool:
        return pool.run(function, *args)
