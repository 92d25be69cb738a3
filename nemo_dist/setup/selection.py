"""Select the plugins of a setup: those that the user named, then the default plugin of every role still needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from nemo_dist.errors import PluginError, TopologyError, UnknownNameError
from nemo_dist.planning.mesh_plan import DENSE_AXES, MeshPlan, Role
from nemo_dist.planning.sizes import ParallelismSizes
from nemo_dist.planning.validation import near, same, shown
from nemo_dist.plugin.declaration import misfit
from nemo_dist.plugin.hook_caller import acts
from nemo_dist.plugin.options import from_mapping
from nemo_dist.plugin.protocol import Plugin, Stage, claimant, claimants, declared, strategy_of
from nemo_dist.plugin.registry import STRATEGY, Registry

Choice = Any  # a plugin name, a config object, or a plugin instance
AUTO = "auto"  # refused as a strategy: to choose stays explicit
DEFAULT = "default"  # means the default strategy, which fills the role "strategy"
RECOMPUTE = "activation_checkpointing"
_KEYWORDS = (RECOMPUTE,)  # keywords of build whose options a strategy may delegate, besides those of axes


@attrs.define
class Selection:
    """The plugins selected so far, and the problems found, one sentence each."""

    registry: Registry
    plugins: list[Plugin] = attrs.field(factory=list)
    problems: list[str] = attrs.field(factory=list)
    wide: list[str] = attrs.field(factory=list)  # the axes of size > 1 and the features that were asked for

    def strategy(self, choice: Choice = DEFAULT) -> Plugin:
        """Select the strategy by a name, a config object, or a plugin instance, which need not be installed."""
        if same(choice, AUTO):
            raise UnknownNameError(
                "strategy 'auto' is refused, as what fits a model must be chosen where it can be read; "
                "`nemo-dist search --model CONFIG --gpus N --memory 80GiB --seq LENGTH --batch ROWS` ranks every "
                "topology and prints the call to paste"
            )
        plugin = self._plugin(self._default_strategy() if same(choice, DEFAULT) else choice, "strategy")
        if plugin.stage != Stage.DATA:
            self.problems.append(
                f"plugin {plugin.name!r} is no strategy (it acts at stage {plugin.stage}); pass it in plugins=(...), "
                f"and one of {', '.join(self._strategies())} as strategy"
            )
        self.plugins.append(plugin)
        return plugin

    def strategy_type(self, name: str) -> type[Plugin]:
        """Return the plugin class of the strategy called *name*; raise UnknownNameError with the nearest match."""
        return self._load(self._default_strategy() if name == DEFAULT else name, "strategy")

    def _default_strategy(self) -> str:
        name = self.registry.role(STRATEGY)
        if name is None:
            raise TopologyError(
                [f"no strategy was named and no installed plugin has that role; name one of {self._strategies()}"]
            )
        return name

    def extras(self, choices: Iterable[Choice]) -> None:
        """Select the plugins that the user passed as ``plugins=``."""
        if isinstance(choices, str | Mapping) or not isinstance(choices, Iterable):
            way = f"; write ({shown(choices)},)" if isinstance(choices, str) else ""
            raise TypeError(f"plugins must be a tuple of names, configs or plugins (got {shown(choices)}){way}")
        for choice in choices:
            self._add(self._plugin(choice, "plugins"))

    def option(self, role: str, keyword: str, value: Any) -> None:
        """Select the plugin that *keyword* of ``build`` configures; *value* is its config or a mapping of options."""
        if isinstance(value, Mapping):
            name = self.registry.role(role)
            if name is None:
                self.problems.append(f"{keyword} was given, but no installed plugin fills the role {role!r}")
                return
            plugin_type = self.registry.load(name)
            self._add(plugin_type(from_mapping(plugin_type.config_type, value, keyword)))  # type: ignore[call-arg]
        else:
            self._add(self._plugin(value, keyword, by_name=False))

    def role(self, role: str, need: str, **settings: Any) -> None:
        """Select the default plugin of *role* with the options *settings*; *need* says in an error why."""
        name = self.registry.role(role)
        if name is None:
            others = self.registry.claimants(role)
            hint = f"; installed plugins that do: {', '.join(others)}" if others else ""
            chosen = ", ".join(plugin.name for plugin in self.plugins)
            self.problems.append(f"{need}, but no selected plugin handles it (selected: {chosen}){hint}")
            return
        plugin_type = self.registry.load(name)
        self._add(plugin_type(plugin_type.config_type(**settings)))  # type: ignore[call-arg]

    def filling(self, role: str) -> Plugin | None:
        """Return the default plugin of *role* if it is selected already, else None."""
        beside = [plugin for plugin in self.plugins if plugin.stage != Stage.DATA]
        return next((plugin for plugin in beside if self.registry.fills(plugin.name, role)), None)

    def own_axes(self, sizes: ParallelismSizes) -> ParallelismSizes:
        """Select a plugin for every axis of ``extra`` above 1; return *sizes* with the roles that plugins declare."""
        for axis, size in sizes.extra.items():
            if size > 1 and claimant(self.plugins, axis) is None:
                self.role(axis, f"axis {axis!r} has size {size}")
        roles: dict[str, Role] = {}
        for plugin in self.plugins:
            for axis, role in declared(plugin, "roles").items():
                if axis in DENSE_AXES or axis not in plugin.axes:
                    self.problems.append(
                        f"plugin {plugin.name!r} declares a role for axis {axis!r}, which is not an axis of its own; "
                        "claim it in 'axes' under a name that no plan has"
                    )
                elif role not in (Role.LAYERS, Role.BATCH, Role.SEQUENCE, Role.PARAMETERS):
                    self.problems.append(f"plugin {plugin.name!r} gives axis {axis!r} the role {role!r}; name one Role")
                else:
                    roles[axis] = role
        return sizes.with_roles(roles)

    def axes(self, sizes: ParallelismSizes, world_size: int) -> None:
        """Select the default plugin of every axis of size > 1 that no selected plugin claims.

        It gets the options for that axis from the strategy's config. Such options for an axis of size 1, or one that
        another plugin claims, are a problem.
        """
        delegated = {axis: self.delegated(axis) for axis in self._delegates() if axis not in _KEYWORDS}
        self.wide = [*_wide(sizes, world_size)]
        for axis, size in _wide(sizes, world_size).items():
            if claimant(self.plugins, axis) is None:
                self.role(axis, f"axis {axis!r} has size {size}", **delegated.pop(axis, {}))
        for axis, given in delegated.items():
            found = claimant(self.plugins, axis)
            for option, value in given.items():
                way = f"set {axis}_size > 1 or leave it out" if found is None else f"set it on {shown(found.config)}"
                who = f"{axis}_size is 1" if found is None else f"plugin {found.name!r} was given for axis {axis!r}"
                self.problems.append(f"{option}={shown(value)} was given on the strategy, but {who}; {way}")

    def _delegates(self) -> Mapping[str, tuple[str, ...]]:
        delegates: Mapping[str, tuple[str, ...]] = declared(strategy_of(self.plugins), "delegates")
        return delegates

    def delegated(self, role: str) -> dict[str, Any]:
        """Return the options for *role* that are set on the strategy's config and differ from their defaults."""
        strategy = strategy_of(self.plugins)
        if strategy is None:
            return {}
        default, names = strategy.config_type(), self._delegates().get(role, ())
        given = {name: getattr(strategy.config, name) for name in names}
        return {name: value for name, value in given.items() if not same(value, getattr(default, name))}

    def judge_composition(self, strategy: Plugin, sizes: ParallelismSizes, world_size: int) -> None:
        """Add a problem for every axis of size > 1 of another plugin that does not compose with *strategy*.

        One of the two must declare in ``composes_with`` that it does. A plugin without an axis that changes what is
        trained is judged under its name.
        """
        for axis, size in _wide(sizes, world_size).items():
            found = claimants(self.plugins, axis)
            if len(found) > 1:
                self.problems.append(_claimed_by_several(axis, size, found))
            elif found and found[0] is not strategy and not _compose(strategy, axis, found[0]):
                self.problems.append(self._uncomposed(f"axis {axis!r} has size {size}", axis, strategy))
        for plugin in self.plugins:
            if plugin is not strategy and not plugin.axes and acts(plugin):
                self._judge_without_axis(plugin, strategy)

    def _judge_without_axis(self, plugin: Plugin, strategy: Plugin) -> None:
        if any(self.registry.fills(plugin.name, keyword) for keyword in _KEYWORDS):
            return  # judged as the feature that the keyword asks for
        if not _compose(strategy, plugin.name, plugin):
            proven = " or ".join(map(repr, sorted(plugin.composes_with)))
            way = f"use {proven}" if proven else "list the strategies that it is tested with in its composes_with"
            self.problems.append(
                f"plugin {plugin.name!r} changes what is trained, but neither it nor strategy {strategy.name!r} says "
                f"that they compose; {way}"
            )

    def judge_feature(self, strategy: Plugin, feature: str, need: str) -> None:
        """Add a problem if *strategy* does not compose with *feature*, which is no axis; *need* starts its sentence."""
        self.wide.append(feature)
        if feature not in strategy.composes_with:
            self.problems.append(self._uncomposed(need, feature, strategy))

    def _uncomposed(self, need: str, feature: str, strategy: Plugin) -> str:
        some = self.registry.composing(feature)
        able = [name for name in some if all(self._takes(name, axis) for axis in self.wide)]
        way = f"use {' or '.join(map(repr, able or some))}" if some else "no installed strategy does"
        if some and not able:
            rest = " and ".join(map(repr, [axis for axis in self.wide if axis not in (feature, "dp_shard")]))
            way += f", without {rest}: no installed strategy takes them together"
        return f"{need}, but strategy {strategy.name!r} does not compose with it; {way}"

    def _takes(self, name: str, axis: str) -> bool:
        """Whether the strategy called *name* shards along *axis*, or composes with the plugin that does."""
        found, other = self.registry.load(name), claimant(self.plugins, axis)
        return axis in found.axes | found.composes_with or (other is not None and name in other.composes_with)

    def _add(self, plugin: Plugin) -> None:
        if any(plugin.name == other.name for other in self.plugins):
            self.problems.append(f"plugin {plugin.name!r} is selected twice; name it once")
        elif plugin.stage == Stage.DATA:
            self.problems.append(f"plugin {plugin.name!r} is a strategy; a setup has exactly one, in strategy=")
        else:
            self.plugins.append(plugin)

    def _plugin(self, choice: Choice, what: str, by_name: bool = True) -> Plugin:
        """Return the plugin for *choice*: a plugin name, a config object, or a plugin instance."""
        plugin = self._made(choice, what, by_name)
        if problem := misfit(plugin):
            raise PluginError(f"plugin {shown(plugin.name)} ({type(plugin).__name__}) {problem}")
        self.registry.refuse_off(plugin.name)
        return plugin

    def _made(self, choice: Choice, what: str, by_name: bool) -> Plugin:
        if isinstance(choice, type):
            raise TypeError(f"{what} must be an instance (got the class {choice.__name__}); write {choice.__name__}()")
        if isinstance(choice, str) and by_name:
            plugin_type = self._load(choice, what)
            return plugin_type(plugin_type.config_type())  # type: ignore[call-arg]
        if isinstance(choice, Plugin):
            return choice
        name = getattr(choice, "plugin", None)
        if not isinstance(name, str):
            kinds = "a plugin name, a config object or a plugin instance" if by_name else "its config object or a dict"
            raise TypeError(
                f"{what} must be {kinds} (got {shown(choice)}); installed plugins: {', '.join(self.registry)}"
            )
        plugin_type = self._load(name, what)
        if not isinstance(choice, plugin_type.config_type):
            raise TypeError(
                f"{what}: plugin {shown(name)} takes a {plugin_type.config_type.__name__} (got {shown(choice)})"
            )
        return plugin_type(choice)  # type: ignore[call-arg]

    def _load(self, name: str, what: str) -> type[Plugin]:
        try:
            return self.registry.load(name)
        except UnknownNameError as error:
            if what != "strategy":
                raise
            valid = self._strategies()
            hint = near(self.registry.spelled(name), valid)
            raise UnknownNameError(f"unknown strategy {shown(name)}{hint}; valid names: {', '.join(valid)}") from error

    def _strategies(self) -> list[str]:
        return [name for name in self.registry if self.registry.stage(name) == Stage.DATA]


def _compose(strategy: Plugin, word: str, plugin: Plugin) -> bool:
    """Whether *strategy* lists *word*, an axis or the name of *plugin*, or *plugin* lists the strategy."""
    return word in strategy.composes_with or strategy.name in plugin.composes_with


def _claimed_by_several(axis: str, size: int, plugins: Iterable[Plugin]) -> str:
    names = [repr(plugin.name) for plugin in plugins]
    return (
        f"axis {axis!r} has size {size} and is claimed by {' and '.join(names)}, which would each split the work along "
        f"it; leave out {' or '.join(names)}"
    )


def _wide(sizes: ParallelismSizes, world_size: int) -> dict[str, int]:
    """Return the requested axes of size > 1, outermost first; those that are not in the dense mesh come last."""
    dense = {axis.name: axis.size for axis in MeshPlan.nearest(sizes, world_size).wide}
    return dense | {axis: size for axis, size in sizes.beyond_dense.items() if size > 1}
