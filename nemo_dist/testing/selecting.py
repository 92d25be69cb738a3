"""The smallest setup that puts a plugin to work: its axes at size 2, a strategy that takes it, all in float32."""

from __future__ import annotations

import math
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
    """Return the keywords of ``DistributedSetup.build`` that select the installed plugin *name*, its axes at size 2.

    ``world_size`` is among them. A plugin that is no strategy gets the default one or, where it lists strategies in
    ``composes_with`` and not that one, the first of those. An axis without a role is asked for if ``build`` takes it.
    """
    registry = Registry()
    kind: Any = registry.load(name)
    if kind.stage == Stage.DATA:
        return {"strategy": in_float32(name), "world_size": 2}
    known = {f"{axis}_size": 2 for axis in _SIZED if axis in kind.axes}
    with_role = {axis: 2 for axis in sorted(kind.axes) if axis in declared(kind, "roles")}
    found = _keywords(registry, name, known, with_role)
    if known or with_role:
        return found
    for axis in sorted(kind.axes - set(DENSE_AXES)):
        wide = _keywords(registry, name, {}, {axis: 2})
        try:
            DistributedSetup.build(**wide)
        except TopologyError:
            continue  # an axis that its view derives from another
        return wide
    return found


def _keywords(registry: Registry, name: str, known: dict[str, int], own: dict[str, int]) -> dict[str, Any]:
    listed = sorted(registry.load(name).composes_with & set(registry))
    default = registry.role(STRATEGY)
    strategy = default if default in listed or not listed else listed[0]
    roles = declared(registry.load(name), "roles")
    sizes = (*known.values(), *(size for axis, size in own.items() if axis in roles))
    return {
        "strategy": in_float32(strategy or listed[0]),
        "parallelism_sizes": ParallelismSizes(**known, extra=own),
        "plugins": (name,),
        "world_size": max(2, math.prod(sizes)),
    }
