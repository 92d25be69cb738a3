"""Try whether a setup takes a model, as any of its ranks and without weights: split and shard it, and no more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nemo_dist.dry_run.imagined_world import imagined_world
from nemo_dist.errors import NemoDistError, TopologyError
from nemo_dist.setup.setup import DistributedSetup


def refusals(setup: DistributedSetup, make: Callable[[], Any]) -> tuple[str, ...]:
    """Return why *setup* does not take the model that *make* returns, whose parameters are on meta: () where it does.

    The model is that of the first rank, and takes no memory. Raises RankError in a process with a process group, and
    whatever code of the model raises that does not run without weights.
    """
    with imagined_world(setup.plan.world_size, 0):
        try:
            setup.shard(make())
        except TopologyError as error:
            return tuple(error.problems)
        except (NemoDistError, ValueError) as error:
            return (str(error),)
    return ()
