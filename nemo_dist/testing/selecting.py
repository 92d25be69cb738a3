"""The smallest setup that puts a plugin to work: two ranks, an axis of it at size 2, and a strategy that takes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_dist.errors import NemoDistError, PluginError
from nemo_dist.planning.mesh_plan import DENSE_AXES
from nemo_dist.planning.sizes import ParallelismSizes
from nemo_dist.plugin.protocol import Stage, declared
from nemo_dist.plugin.registry import STRATEGY, Registry
from nemo_dist.setup.setup import DistributedSetup
from nemo_dist.testing.precision import in_float32

MODEL_AXES = ("pp", "cp", "tp", "ep")  # axes with a field of their own that are not the strategy's
RECOMPUTE = "activation_checkpointing"


def smallest(name: str) -> dict[str, Any]:
    """Return the keywords of ``DistributedSetup.build`` that select the installed plugin *name* in float32.

    A plugin that is no strategy gets the default one or, where it composes with others and not with that one, the first
    of those. Of its axes the first has size 2, one without a role only if ``build`` takes it so; the kit tries each.
    """
    kind: Any = Registry().load(name)
    if kind.stage == Stage.DATA:
        return {"strategy": in_float32(name)}
    partners, default = partners_of(kind), default_strategy()
    strategy = default if default in partners or not partners else partners[0]
    chosen = {"strategy": in_float32(strategy), "plugins": (name,)}
    known = [axis for axis in MODEL_AXES if axis in kind.axes]
    if known:
        return chosen | {"parallelism_sizes": ParallelismSizes(**{f"{known[0]}_size": 2})}
    for axis in own_axes(kind):
        wide = chosen | {"parallelism_sizes": ParallelismSizes(extra={axis: 2})}
        if axis in declared(kind, "roles") or is_accepted(wide, 2):
            return wide
    return chosen


def own_axes(kind: Any) -> list[str]:
    """Return the axes of the plugin class *kind* that sizes name in ``extra``: those with a role, then the others."""
    roles = declared(kind, "roles")
    return sorted(kind.axes - {*DENSE_AXES, *MODEL_AXES}, key=lambda axis: (axis not in roles, axis))


def default_strategy() -> str:
    """Return the name of the strategy that ``build`` takes when none is named."""
    name = Registry().role(STRATEGY)
    if name is None:
        raise PluginError("no installed plugin fills the role 'strategy', so there is nothing to test plugins with")
    return name


def partners_of(plugin: Any) -> list[str]:
    """Return the installed strategies that compose with *plugin*, a plugin beside a strategy, by what either says."""
    registry = Registry()
    words = {plugin.name, *plugin.axes}
    found = []
    for name in registry:
        strategy = _quietly(registry, name)
        if strategy is not None and strategy.stage == Stage.DATA:
            fills = registry.fills(plugin.name, RECOMPUTE) and RECOMPUTE in strategy.composes_with
            if fills or name in plugin.composes_with or words & strategy.composes_with:
                found.append(name)
    return found


def _quietly(registry: Registry, name: str) -> Any:
    try:
        return registry.load(name)
    except PluginError:
        return None


def is_accepted(keywords: Mapping[str, Any], world_size: int) -> bool:
    """Whether ``build`` takes *keywords* on *world_size* ranks."""
    try:
        DistributedSetup.build(**keywords, world_size=world_size)
    except NemoDistError:
        return False
    return True
