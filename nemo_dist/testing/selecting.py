"""The smallest setup that puts a plugin to work: two ranks, an axis of it at size 2, and a strategy that takes it."""

from __future__ import annotations

from typing import Any

from nemo_dist.errors import TopologyError
from nemo_dist.planning.mesh_plan import DENSE_AXES
from nemo_dist.planning.sizes import ParallelismSizes
from nemo_dist.plugin.protocol import Stage, declared
from nemo_dist.plugin.registry import STRATEGY, Registry
from nemo_dist.setup.setup import DistributedSetup
from nemo_dist.testing.precision import in_float32

_SIZED = ("pp", "cp", "tp", "ep")  # axes with a field of their own that are not the strategy's


def smallest(name: str) -> dict[str, Any]:
    """Return the keywords of ``DistributedSetup.build`` that select the installed plugin *name* in float32.

    A plugin that is no strategy gets the default one or, where it lists strategies in ``composes_with`` and not that
    one, the first of those. Of its axes one has size 2; one without a role only if ``build`` takes it so.
    """
    registry = Registry()
    kind: Any = registry.load(name)
    if kind.stage == Stage.DATA:
        return {"strategy": in_float32(name)}
    listed = sorted(kind.composes_with & set(registry))
    default = registry.role(STRATEGY)
    strategy = default if default in listed or not listed else listed[0]
    chosen = {"strategy": in_float32(strategy or listed[0]), "plugins": (name,)}
    known = [axis for axis in _SIZED if axis in kind.axes]
    if known:
        return chosen | {"parallelism_sizes": ParallelismSizes(**{f"{known[0]}_size": 2})}
    roles = declared(kind, "roles")
    own = sorted(kind.axes - set(DENSE_AXES), key=lambda axis: (axis not in roles, axis))
    for axis in own:
        wide = chosen | {"parallelism_sizes": ParallelismSizes(extra={axis: 2})}
        if axis in roles or _is_accepted(wide):
            return wide
    return chosen


def _is_accepted(keywords: dict[str, Any]) -> bool:
    """Whether ``build`` takes *keywords*; not with an axis that a view derives from another."""
    try:
        DistributedSetup.build(**keywords, world_size=2)
    except TopologyError:
        return False
    return True
