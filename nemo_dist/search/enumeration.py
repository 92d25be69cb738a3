"""Enumerate every topology of a space that ``build`` accepts, lazily and each once; integers only, no torch.

What ``build`` says of plugins and of how they compose depends on which axes are wide, not on how wide they are, so it
is asked once for each set of wide axes; what it says of sizes, for each of them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from itertools import product
from typing import Any

import attrs

from nemo_dist.planning.mesh_plan import MeshPlan
from nemo_dist.planning.sizes import ParallelismSizes
from nemo_dist.planning.views import View
from nemo_dist.plugin.hook_caller import PluginCalls
from nemo_dist.plugin.protocol import Plugin
from nemo_dist.plugin.registry import Registry
from nemo_dist.search.space import OWN, Space
from nemo_dist.setup.request import Request
from nemo_dist.setup.selection import RECOMPUTE
from nemo_dist.setup.setup import DistributedSetup


@attrs.frozen(kw_only=True)
class Topology:
    """One way to train: what ``build`` is called with, and the plan and plugins that it makes of that.

    ``strategy`` and ``plugins`` are config objects; of plugins only those with options that are no defaults.
    """

    world_size: int
    strategy: Any
    parallelism_sizes: ParallelismSizes
    activation_checkpointing: bool | str = False
    plugins: tuple[Any, ...] = ()
    device_type: str | None = None
    plan: MeshPlan = attrs.field(eq=False, repr=False)
    calls: PluginCalls = attrs.field(eq=False, repr=False)
    selected: tuple[Plugin, ...] = attrs.field(eq=False, repr=False)

    @property
    def keywords(self) -> dict[str, Any]:
        """The keywords of ``DistributedSetup.build``."""
        names = ("strategy", "parallelism_sizes", RECOMPUTE, "world_size", "plugins", "device_type")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def of(cls, setup: DistributedSetup, plugins: tuple[Any, ...] = ()) -> Topology:
        """Return the topology of *setup*, which was built with these *plugins*."""
        return cls(
            world_size=setup.plan.world_size,
            strategy=setup.strategy_config,
            parallelism_sizes=setup.parallelism_sizes,
            activation_checkpointing=setup.activation_checkpointing,
            plugins=plugins,
            device_type=setup.device_type,
            plan=setup.plan,
            calls=setup.calls,
            selected=setup.plugins,
        )

    def with_rows(self, rows: int) -> Topology:
        """Return it with *rows* rows in a forward, where an option of a plugin says how many those are.

        A plugin names that option in ``rows_option`` of its config class.
        """
        for plugin in self.selected:
            option = getattr(plugin.config_type, "rows_option", None)
            if option is None or getattr(plugin.config, option) == rows:
                continue
            config = attrs.evolve(plugin.config, **{option: rows})
            made: Any = type(plugin)
            others = tuple(one for one in self.plugins if getattr(one, "plugin", None) != plugin.name)
            selected = tuple(made(config) if one is plugin else one for one in self.selected)
            return attrs.evolve(self, plugins=(*others, config), selected=selected, calls=PluginCalls(selected))
        return self

    def build(self, registry: Registry | None = None) -> DistributedSetup:
        """Return the setup."""
        return DistributedSetup.build(**self.keywords, registry=registry)


@attrs.frozen(kw_only=True, eq=False)
class _Variant:
    """The options of plugins, and the request that they make, for all sizes with the same wide axes."""

    strategy: Any
    mode: bool | str
    plugins: tuple[Any, ...]
    request: Request


def topologies(space: Space) -> Iterator[Topology]:
    """Yield every topology of *space* that ``build`` accepts, each once, as soon as it is found."""
    variants: dict[frozenset[str], _Variants] = {}
    strategies = space.strategy_types()
    dense = {axis.name for axis in space.axes() if axis.dense}
    for sizes in space.sizes():
        wide = frozenset(_wide(sizes, space.world_size, dense))
        if wide not in variants:
            variants[wide] = _Variants(_variants(space, sizes, strategies))
        plans: dict[Any, dict[tuple[View, ...], MeshPlan]] = {}
        for variant in variants[wide]:
            found = variant.request
            own = sizes.with_roles(found.sizes.roles) if sizes.extra else sizes
            known = plans.setdefault(own.roles, {})
            plan, problems = found.judged(own, space.world_size, space.device_type, known)
            if not problems:
                yield Topology(
                    world_size=space.world_size,
                    strategy=variant.strategy,
                    parallelism_sizes=own,
                    activation_checkpointing=variant.mode,
                    plugins=variant.plugins,
                    device_type=space.device_type,
                    plan=plan,
                    calls=found.calls,
                    selected=found.plugins,
                )


@attrs.define
class _Variants:
    """Variants that are found when they are first asked for, and kept."""

    source: Iterator[_Variant]
    kept: list[_Variant] = attrs.field(factory=list)

    def __iter__(self) -> Iterator[_Variant]:
        yield from self.kept
        for variant in self.source:
            self.kept.append(variant)
            yield variant


def _wide(sizes: ParallelismSizes, world_size: int, dense: Collection[str]) -> Iterator[str]:
    """Yield the axes of *sizes* that are wide; data parallelism too, which gets what the *dense* ones leave."""
    own = {axis: getattr(sizes, f"{axis}_size") or 1 for axis in OWN} | dict(sizes.extra)
    yield from (axis for axis, size in own.items() if size > 1)
    if world_size > math.prod(size for axis, size in own.items() if axis in dense):
        yield "dp_shard"


def _variants(space: Space, sizes: ParallelismSizes, strategies: list[type[Plugin]]) -> Iterator[_Variant]:
    """Yield the combinations of options that ``build`` has nothing against, whatever the sizes of the wide axes.

    Options may add problems, but do not solve those that plugins have with their defaults.
    """
    for strategy_type in strategies:
        for mode in space.modes:
            default = _select(space, sizes, strategy_type.config_type(), mode, ())
            if default.problems:
                continue
            for strategy, configs in _options(space, strategy_type, default):
                plain = not configs and strategy == strategy_type.config_type()
                request = default if plain else _select(space, sizes, strategy, mode, configs)
                if not request.problems:
                    yield _Variant(strategy=strategy, mode=mode, plugins=(*space.plugins, *configs), request=request)


def _options(space: Space, strategy_type: type[Plugin], default: Request) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Yield a config of the strategy with configs of the plugins selected by *default* that have other options."""
    recompute = space.registry.role(RECOMPUTE)  # whose options are the modes
    given = {getattr(plugin, "plugin", getattr(plugin, "name", None)) for plugin in space.plugins}
    kinds = [
        plugin.config_type
        for plugin in default.plugins
        if not isinstance(plugin, strategy_type) and plugin.name not in given and plugin.name != recompute
    ]
    for own, *others in product(*(list(space.choices(kind)) for kind in (strategy_type.config_type, *kinds))):
        configs = tuple(kind(**options) for kind, options in zip(kinds, others, strict=True) if options)
        yield strategy_type.config_type(**own), configs


def _select(
    space: Space, sizes: ParallelismSizes, strategy: Any, mode: bool | str, configs: tuple[Any, ...]
) -> Request:
    return Request.select(
        sizes,
        space.world_size,
        space.registry,
        strategy=strategy,
        activation_checkpointing=mode,
        plugins=(*space.plugins, *configs),
    )
