"""The setups in which the conformance kit trains: the axes of a plugin wide, and all that it says it composes with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from nemo_dist.errors import PluginError
from nemo_dist.planning.sizes import ParallelismSizes
from nemo_dist.plugin.options import accepted_names
from nemo_dist.plugin.protocol import Stage, declared
from nemo_dist.plugin.registry import STRATEGY, Registry
from nemo_dist.testing.precision import FP32

MODEL_AXES = ("pp", "cp", "tp", "ep")  # of those that ParallelismSizes has a field for
_RECOMPUTE = "activation_checkpointing"
_POLICY = "mp_policy"  # the option of strategies that compute in another dtype than they store
_EXPERTS = "qwen3-moe"


@attrs.frozen(kw_only=True)
class Case:
    """A setup to train in: its name in messages, the keywords of ``build``, the number of ranks and the model."""

    name: str
    build: Mapping[str, Any]
    world: int
    specimen: str


def in_float32(strategy: str) -> Any:
    """Return the strategy called *strategy* with all computation in float32: a config, or the name where it has it."""
    config_type = Registry().load(strategy).config_type
    return config_type(mp_policy=FP32) if _POLICY in accepted_names(config_type) else strategy


def default_strategy() -> str:
    """Return the name of the strategy that ``build`` takes when none is named."""
    name = Registry().role(STRATEGY)
    if name is None:
        raise PluginError("no installed plugin fills the role 'strategy', so there is nothing to test plugins with")
    return name


def usual_build(plugin: Any) -> dict[str, Any]:
    """Return the keywords of ``build`` that select the class *plugin* in float32, with its own axes of 2 ranks."""
    if plugin.stage == Stage.DATA:
        return {"strategy": in_float32(plugin.name)}
    partners = partners_of(plugin)
    first = default_strategy()
    strategy = first if first in partners or not partners else partners[0]
    build = {"strategy": in_float32(strategy), "plugins": (plugin.name,)}
    sizes = _own_sizes(plugin)
    return build | ({"parallelism_sizes": sizes} if sizes is not None else {})


def _own_sizes(plugin: Any) -> ParallelismSizes | None:
    """Return sizes in which one axis of *plugin* is 2: one of ours, else one of its own."""
    ours = [axis for axis in MODEL_AXES if axis in plugin.axes]
    if ours:
        return ParallelismSizes(**{f"{ours[0]}_size": 2})
    own = sorted(declared(plugin, "roles")) or sorted(plugin.axes)
    return ParallelismSizes(extra={own[0]: 2}) if own else None


def partners_of(plugin: Any) -> list[str]:
    """Return the installed strategies that compose with *plugin*, a plugin beside a strategy, by what either says."""
    registry = Registry()
    words = {plugin.name, *plugin.axes}
    found = []
    for name in registry:
        strategy = _quietly(registry, name)
        if strategy is not None and strategy.stage == Stage.DATA:
            fills = registry.fills(plugin.name, _RECOMPUTE) and _RECOMPUTE in strategy.composes_with
            if fills or name in plugin.composes_with or words & strategy.composes_with:
                found.append(name)
    return found


def _quietly(registry: Registry, name: str) -> Any:
    try:
        return registry.load(name)
    except PluginError:
        return None


def composed_cases(plugin: Any, build: Mapping[str, Any], world: int, specimen: str) -> Iterator[Case]:
    """Yield the setups on twice the ranks and with whatever else the class *plugin* says that it composes with.

    ``build`` on *world* ranks is how it is selected alone; every case changes one thing of it.
    """
    sizes = build.get("parallelism_sizes", ParallelismSizes())

    def case(name: str, changes: Mapping[str, Any], ranks: int, model: str = specimen) -> Case:
        return Case(name=name, build={**build, **changes}, world=ranks, specimen=model)

    def sized(**more: int) -> dict[str, Any]:
        return {"parallelism_sizes": attrs.evolve(sizes, **more)}

    yield case(f"{2 * world} ranks", {}, 2 * world)
    if plugin.stage != Stage.DATA:
        for other in partners_of(plugin):
            if other != getattr(build.get("strategy"), "plugin", build.get("strategy")):
                yield case(f"strategy {other}", {"strategy": in_float32(other)}, world)
        return
    if "dp_replicate" in plugin.axes | plugin.composes_with:
        yield case("dp_replicate_size=2", sized(dp_replicate_size=2), 2 * world)
    for axis in MODEL_AXES:
        if axis in plugin.composes_with and getattr(sizes, f"{axis}_size") == 1:
            yield case(
                f"{axis}_size=2", sized(**{f"{axis}_size": 2}), 2 * world, _EXPERTS if axis == "ep" else specimen
            )
    if _RECOMPUTE in plugin.composes_with:
        yield case(_RECOMPUTE, {_RECOMPUTE: True}, world)
