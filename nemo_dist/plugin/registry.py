"""Find installed plugins by entry point, and import a plugin only when it is used.

Three groups of entry points exist. ``nemo_dist`` maps each plugin's name to its class. ``nemo_dist.roles`` maps a role
(a mesh axis such as ``tp``, or a keyword of ``DistributedSetup.build``: ``strategy``, ``activation_checkpointing``) to
the name of its default plugin, used when the user chose none. ``nemo_dist.aliases`` maps further names to plugin names.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Any, cast

import attrs

from nemo_dist.errors import PluginError, UnknownNameError
from nemo_dist.planning.validation import near, shown
from nemo_dist.plugin.protocol import Plugin, Stage

GROUP = "nemo_dist"
ROLES = "nemo_dist.roles"
ALIASES = "nemo_dist.aliases"
STRATEGY = "strategy"  # the role that names the default strategy


def owner(entry: EntryPoint) -> str:
    """Return the name and version of the distribution that declares *entry*."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown distribution"


def _of(group: str) -> Any:
    return attrs.Factory(lambda self: tuple(self.installed.select(group=group)), takes_self=True)


@attrs.frozen
class Registry:
    """The installed plugins: iterating yields their names, ``load`` imports a class.

    Raises PluginError when two distributions declare the same plugin name.
    """

    installed: Any = attrs.field(factory=entry_points, repr=False, kw_only=True)  # of all groups, read once
    entries: tuple[EntryPoint, ...] = attrs.field(default=_of(GROUP))
    roles: tuple[EntryPoint, ...] = attrs.field(default=_of(ROLES))
    aliases: tuple[EntryPoint, ...] = attrs.field(default=_of(ALIASES))

    @entries.validator
    def _one_owner_each(self, _: object, entries: tuple[EntryPoint, ...]) -> None:
        owners: dict[str, EntryPoint] = {}
        for entry in entries:
            if entry.name in owners:
                first = owners[entry.name]
                raise PluginError(
                    f"plugin {entry.name!r} is declared by both {owner(first)} ({first.value}) and {owner(entry)} "
                    f"({entry.value}); uninstall one of them"
                )
            owners[entry.name] = entry

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(entry.name for entry in self.entries))

    def entry(self, name: str) -> EntryPoint:
        """Return the entry point called *name*; raise UnknownNameError (a ValueError) with the nearest match."""
        wanted = self.spelled(name)
        for entry in self.entries:
            if entry.name == wanted:
                return entry
        raise UnknownNameError(
            f"no plugin {shown(name)} is installed{near(wanted, self)} (installed: {', '.join(self) or 'none'})"
        )

    def spelled(self, name: str) -> str:
        """Return *name* as the catalogue spells it: lower case, underscores, an alias resolved.

        A plugin's own name comes before aliases, so none can take its place. Raises TypeError for what is no text.
        """
        if not isinstance(name, str):
            raise TypeError(f"the name of a plugin must be text (got {shown(name)})")
        plain = name.strip().lower().replace("-", "_")
        if any(entry.name == plain for entry in self.entries):
            return plain
        found = {alias.value: alias for alias in self.aliases if alias.name == plain}
        if len(found) > 1:
            who = " and ".join(f"{value!r} of {owner(alias)}" for value, alias in found.items())
            raise PluginError(f"the alias {plain!r} stands for {who}; name the plugin itself")
        return next(iter(found), plain)

    def load(self, name: str) -> type[Plugin]:
        """Import and return the plugin class called *name*.

        Raises PluginError with the name of the distribution when it does not import or is not a plugin class, and
        UnknownNameError when no such plugin is installed.
        """
        entry = self.entry(name)
        try:
            plugin = entry.load()
        except Exception as error:
            raise PluginError(
                f"plugin {entry.name!r} ({entry.value}, from {owner(entry)}) failed to import: "
                f"{type(error).__name__}: {error}; repair or uninstall it"
            ) from error
        problem = _misfit(plugin, entry)
        if problem:
            raise PluginError(f"plugin {entry.name!r} ({entry.value}, from {owner(entry)}) {problem}")
        return cast(type[Plugin], plugin)

    def role(self, role: str) -> str | None:
        """Return the name of the default plugin for *role*, or None; raise PluginError when two are declared."""
        found = [entry for entry in self.roles if entry.name == role]
        if len({entry.value for entry in found}) > 1:
            who = " and ".join(f"{entry.value!r} of {owner(entry)}" for entry in found)
            raise PluginError(f"the role {role!r} is declared by {who}; name the one you want in plugins=(...)")
        return found[0].value if found else None

    def claimants(self, axis: str) -> list[str]:
        """Return the names of the installed plugins that claim *axis*, without those that do not import."""
        return [name for name in self if (plugin := self._load_quietly(name)) and axis in plugin.axes]

    def composing(self, feature: str) -> list[str]:
        """Return the names of the installed strategies that import and compose with the axis or feature *feature*."""
        return [
            name
            for name in self
            if (plugin := self._load_quietly(name)) and plugin.stage == Stage.DATA and feature in plugin.composes_with
        ]

    def stage(self, name: str) -> int | None:
        """Return the stage of the plugin called *name*, or None when it cannot be loaded."""
        plugin = self._load_quietly(name)
        return plugin.stage if plugin else None

    def _load_quietly(self, name: str) -> type[Plugin] | None:
        try:
            return self.load(name)
        except PluginError:
            return None


def _misfit(plugin: Any, entry: EntryPoint) -> str:
    """Return why *plugin* is not a valid plugin class, or an empty string."""
    declared: Any = plugin
    if not isinstance(plugin, type):
        return f"must be a class (got {type(plugin).__name__})"
    missing = [name for name in ("name", "config_type", "stage", "axes", "composes_with") if not hasattr(plugin, name)]
    if missing:
        return f"lacks the class attribute {', '.join(map(repr, missing))}; see nemo_dist.Plugin"
    if declared.name != entry.name:
        return f"calls itself {declared.name!r}; the entry point and the class must agree"
    return ""
