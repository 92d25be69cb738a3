"""The pytest plugin: fixtures that run functions on ranks, and the ``gpu`` marker; imports torch only when needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from nemo_dist.testing.pool import RankPool, RankPools


def pytest_configure(config: pytest.Config) -> None:
    """Register the ``gpu`` marker."""
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped, with the reason, where there is none")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked ``gpu`` where there is no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        reason = f"torch {torch.__version__} sees no CUDA device on this machine"
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def rank_pools() -> Iterator[RankPools]:
    """Provide the session's pools of gloo ranks, one per world size, started on demand."""
    from nemo_dist.testing.pool import RankPools

    pools = RankPools()
    yield pools
    pools.close()


@pytest.fixture(scope="session")
def ranks(rank_pools: RankPools) -> Callable[[int], RankPool]:
    """Provide ``ranks(world_size).run(function, ...)``; session-scoped, so that Hypothesis tests may use it."""
    return rank_pools


@pytest.fixture(scope="session")
def on_ranks(rank_pools: RankPools) -> Callable[..., list[Any]]:
    """Provide ``on_ranks(world_size, function, ...)``, which returns the results in rank order."""

    def run(world_size: int, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> list[Any]:
        __tracebackhide__ = True
        return rank_pools(world_size).run(function, *args, **kwargs)

    return run
