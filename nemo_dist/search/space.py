"""Say what to search: the axes that installed plugins claim, sizes that are fixed or bounded, strategies and options.

A plugin names options that are worth trying in ``worth_trying`` of its config class, a mapping from option to values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import attrs

from nemo_dist.errors import PluginError, TopologyError
from nemo_dist.planning.mesh_plan import DENSE_AXES
from nemo_dist.planning.sizes import ParallelismSizes
from nemo_dist.planning.validation import FrozenMapping, integer, near, number_of_ranks, shown
from nemo_dist.plugin.protocol import Plugin, Stage, declared
from nemo_dist.plugin.registry import STRATEGY, Registry
from nemo_dist.setup.selection import Selection
from nemo_dist.setup.setup import DistributedSetup

MODES: tuple[bool | str, ...] = (False, "selective", True)  # of activation checkpointing, from fastest to smallest
_FIELDS = tuple(
    field.name.removesuffix("_size") for field in attrs.fields(ParallelismSizes) if field.name.endswith("_size")
)
OWN = tuple(axis for axis in _FIELDS if axis != "dp")


@attrs.frozen
class SearchedAxis:
    """An axis whose size is searched: ``dense`` ones multiply to the ranks; others divide the same ranks once more."""

    name: str
    dense: bool


def _frozen(sizes: Mapping[str, int]) -> FrozenMapping[int]:
    return FrozenMapping(dict(sizes))


@attrs.frozen(kw_only=True)
class Space:
    """What to search on ``world_size`` ranks.

    ``fixed``: sizes of axes, by name (``tp``, ``dp``, that of a third party); the others are searched. ``bounds``: the
    largest size of an axis that is searched. ``strategies``: names; None is every installed one. ``modes``: of
    activation checkpointing. ``options``: try the options that plugins find worth trying, beside their defaults.
    ``plugins``: configs or instances that every topology has, as in ``build``; their axes are searched too.
    """

    world_size: int = attrs.field()
    fixed: Mapping[str, int] = attrs.field(factory=FrozenMapping, converter=_frozen)
    bounds: Mapping[str, int] = attrs.field(factory=FrozenMapping, converter=_frozen)
    strategies: tuple[str, ...] | None = None
    modes: tuple[bool | str, ...] = MODES
    options: bool = True
    plugins: tuple[Any, ...] = ()
    device_type: str | None = None
    registry: Registry = attrs.field(factory=Registry, eq=False, repr=False)

    def __attrs_post_init__(self) -> None:
        number_of_ranks("world_size", self.world_size)
        known = [*(axis.name for axis in self.axes()), "dp"]
        for axis, size in (*self.fixed.items(), *self.bounds.items()):
            if axis not in known:
                raise ValueError(f"no axis {shown(axis)} can be searched{near(axis, known)} (axes: {', '.join(known)})")
            integer(f"the size of axis {axis!r}", size)

    def axes(self) -> list[SearchedAxis]:
        """Return the axes whose sizes a request names: ours that a plugin claims, then those of third parties."""
        claimed = {axis for plugin in self._plugin_types() for axis in plugin.axes}
        own = [SearchedAxis(axis, axis in DENSE_AXES) for axis in OWN if axis in claimed]
        roles = {axis: role for plugin in self._plugin_types() for axis, role in declared(plugin, "roles").items()}
        asked_for = {entry.name for entry in self.registry.roles} | {
            axis for plugin in self._given() for axis in plugin.axes
        }
        known = {*_FIELDS, *DENSE_AXES}
        others = sorted(axis for axis in (asked_for & claimed) | roles.keys() if axis not in known)
        return [*own, *(SearchedAxis(axis, axis in roles) for axis in others)]

    def strategy_types(self) -> list[type[Plugin]]:
        """Return the classes of the strategies to try, the default one first.

        Raises what ``build`` raises for a name that is none, and TopologyError for a plugin that is no strategy.
        """
        default = self.registry.role(STRATEGY)
        names = self.strategies
        if names is None:
            found = [name for name in self.registry if self.registry.stage(name) == Stage.DATA]
            names = tuple(sorted(found, key=lambda name: (name != default, name)))
        selections = [(Selection(self.registry), name) for name in names]
        kinds = [type(selection.strategy(name)) for selection, name in selections]
        if problems := [problem for selection, _ in selections for problem in selection.problems]:
            raise TopologyError(problems)
        return kinds

    def refusal(self) -> str | None:
        """Return the first thing that ``build`` has against what is fixed, and nothing else; None for nothing."""
        for kind in self.strategy_types():
            try:
                named = {f"{axis}_size": size for axis, size in self.fixed.items() if axis in _FIELDS}
                extra = {axis: size for axis, size in self.fixed.items() if axis not in _FIELDS and size > 1}
                sizes = ParallelismSizes(**named, extra=extra)
                DistributedSetup.build(
                    kind.config_type(),
                    sizes,
                    world_size=self.world_size,
                    plugins=self.plugins,
                    device_type=self.device_type,
                    registry=self.registry,
                )
            except (ValueError, PluginError) as problem:
                return str(problem).removeprefix("- ").partition("\n")[0]
        return None

    def choices(self, config_type: type) -> Iterator[dict[str, Any]]:
        """Yield the options to try on a config class, the defaults (no option) first."""
        worth = getattr(config_type, "worth_trying", {}) if self.options else {}
        default = config_type()
        for values in product(*worth.values()):
            yield {name: v for name, v in zip(worth, values, strict=True) if v != getattr(default, name)}

    def _plugin_types(self) -> list[type[Plugin]]:
        found = [self.registry.load(name) for name in self.registry if self.registry.stage(name) is not None]
        return [*found, *(type(plugin) for plugin in self._given())]

    def _given(self) -> list[Plugin]:
        return [plugin for plugin in self.plugins if isinstance(plugin, Plugin)]

    def sizes(self) -> Iterator[ParallelismSizes]:
        """Yield every assignment of sizes to axes whose dense part divides the ranks, each once; views may refuse some.

        The first axis changes slowest, from small to large.
        """
        axes = self.axes()
        dense = [axis.name for axis in axes if axis.dense]
        beyond = [axis.name for axis in axes if not axis.dense]
        for inner in self._factors(dense, self.world_size):
            if self.fixed.get("dp") in (None, self._dp(inner)):
                for outer in product(*(self._sizes_of(axis, self.world_size) for axis in beyond)):
                    yield self._as_sizes({**inner, **dict(zip(beyond, outer, strict=True))})

    def _factors(self, axes: list[str], ranks: int) -> Iterator[dict[str, int]]:
        if not axes:
            yield {}
            return
        for size in self._sizes_of(axes[0], ranks):
            for rest in self._factors(axes[1:], ranks // size):
                yield {axes[0]: size, **rest}

    def _sizes_of(self, axis: str, ranks: int) -> list[int]:
        if axis in self.fixed:
            return [self.fixed[axis]] if ranks % self.fixed[axis] == 0 else []
        most = self.bounds.get(axis, ranks)
        return [size for size in divisors(ranks) if size <= most]

    def _dp(self, sizes: Mapping[str, int]) -> int:
        return self.world_size // math.prod(size for axis, size in sizes.items() if axis != "dp_replicate")

    def _as_sizes(self, sizes: Mapping[str, int]) -> ParallelismSizes:
        own = {f"{axis}_size": size for axis, size in sizes.items() if axis in OWN and size > 1}
        extra = {axis: size for axis, size in sizes.items() if axis not in OWN and size > 1}
        found = ParallelismSizes(**own)
        return attrs.evolve(found, extra=extra) if extra else found


def divisors(whole: int) -> list[int]:
    """Return the divisors of *whole*, ascending."""
    small = [n for n in range(1, int(whole**0.5) + 1) if whole % n == 0]
    return [*small, *(whole // n for n in reversed(small) if n * n != whole)]
