"""Find installed plugins by entry point, and import a plugin only when it is used.

Three groups of entry points exist. ``nemo_dist`` maps each plugin's name to its class. ``nemo_dist.roles`` maps a role
(a mesh axis such as ``tp``, or a keyword of ``DistributedSetup.build``: ``strategy``, ``activation_checkpointing``) to
the name of its default plugin, used when the user chose none. ``nemo_dist.aliases`` maps further names to plugin names.
The environment variable ``NEMO_DIST_WITHOUT`` turns plugins off for one process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from importlib.metadata import EntryPoint, entry_points
from typing import Any, cast

import attrs

from nemo_dist.errors import PluginError, UnknownNameError
from nemo_dist.planning.validation import near, shown
from nemo_dist.plugin.declaration import misfit, misnamed
from nemo_dist.plugin.protocol import Plugin, Stage

GROUP = "nemo_dist"
ROLES = "nemo_dist.roles"
ALIASES = "nemo_dist.aliases"
OFF = "NEMO_DIST_WITHOUT"  # the environment variable with the names of plugins that are turned off
STRATEGY = "strategy"  # the role that names the default strategy


def owner(entry: EntryPoint) -> str:
    """Return the name and version of the distribution that declares *entry*."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown distribution"


def _described(entry: EntryPoint) -> str:
    return f"plugin {entry.name!r} ({entry.value}, from {owner(entry)})"  # reads the distribution's files


def _of(group: str) -> Any:
    return attrs.Factory(lambda self: tuple(self.installed.select(group=group)), takes_self=True)


def _turned_off() -> frozenset[str]:
    return frozenset(filter(None, map(_plain, os.environ.get(OFF, "").split(","))))


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "_")


@attrs.frozen
class Registry:
    """The installed plugins: iterating yields their names, ``load`` imports a class.

    Entry points are judged when a plugin is looked up, so that a broken one that nobody selects changes nothing.
    ``off``: names of plugins that are turned off in this process, by default those in the environment variable
    ``NEMO_DIST_WITHOUT``, with commas between them.
    """

    installed: Any = attrs.field(factory=entry_points, repr=False, kw_only=True)  # of all groups, read once
    entries: tuple[EntryPoint, ...] = attrs.field(default=_of(GROUP))
    roles: tuple[EntryPoint, ...] = attrs.field(default=_of(ROLES))
    aliases: tuple[EntryPoint, ...] = attrs.field(default=_of(ALIASES))
    off: frozenset[str] = attrs.field(factory=_turned_off, kw_only=True)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({entry.name for entry in self.entries} - self.off))

    def entry(self, name: str) -> EntryPoint:
        """Return the entry point called *name*.

        Raises UnknownNameError (a ValueError) with the nearest match, and PluginError for a name that two distributions
        declare or that is turned off.
        """
        wanted = self.spelled(name)
        self.refuse_off(wanted)
        found = [entry for entry in self.entries if entry.name == wanted] or [
            entry for entry in self.entries if _plain(entry.name) == wanted
        ]
        if len(found) > 1:
            who = " and ".join(sorted(f"{owner(entry)} ({entry.value})" for entry in found))
            raise PluginError(f"plugin {wanted!r} is declared by both {who}; uninstall one of them")
        if found:
            return found[0]
        raise UnknownNameError(
            f"no plugin {shown(name)} is installed{near(wanted, self)} (installed: {', '.join(self) or 'none'})"
        )

    def refuse_off(self, name: str) -> None:
        """Raise PluginError when the plugin called *name* is turned off."""
        if name in self.off:
            raise PluginError(
                f"plugin {name!r} is turned off in this process by {OFF}={','.join(sorted(self.off))!r}; take it out "
                "there, or choose another plugin"
            )

    def spelled(self, name: str) -> str:
        """Return *name* as the catalogue spells it: lower case, underscores, an alias resolved.

        A plugin's own name comes before aliases, so none can take its place. Raises TypeError for what is no text.
        """
        if not isinstance(name, str):
            raise TypeError(f"the name of a plugin must be text (got {shown(name)})")
        plain = _plain(name)
        if any(_plain(entry.name) == plain for entry in self.entries):
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
        return self._imported(self.entry(name))

    def _imported(self, entry: EntryPoint) -> type[Plugin]:
        if problem := misnamed(entry.name):
            raise PluginError(f"{_described(entry)} {problem}")
        try:
            plugin = entry.load()
            problem = _misfit(plugin, entry)
        except (Exception, SystemExit) as error:  # a module that is a script leaves
            raise PluginError(
                f"{_described(entry)} failed to import: {type(error).__name__}: {error}; repair or uninstall it"
            ) from error
        if problem:
            raise PluginError(f"{_described(entry)} {problem}")
        return cast(type[Plugin], plugin)

    def catalogue(self) -> list[tuple[EntryPoint, type[Plugin] | None, str | None]]:
        """Return every entry point in the order of names, with its plugin class or else why it cannot be used.

        What plugins print when they are imported goes to stderr.
        """
        found: list[tuple[EntryPoint, type[Plugin] | None, str | None]] = []
        for entry in sorted(self.entries, key=lambda entry: (entry.name, owner(entry))):
            try:
                with redirect_stdout(sys.stderr):
                    plugin = self._imported(entry) if misnamed(entry.name) else self.load(entry.name)
                found.append((entry, plugin, None))
            except PluginError as error:
                found.append((entry, None, str(error)))
        return found

    def role(self, role: str) -> str | None:
        """Return the name of the default plugin for *role*, or None.

        Raises PluginError when two are declared, and when the only one is turned off.
        """
        declared = [entry for entry in self.roles if entry.name == role]
        found = [entry for entry in declared if entry.value not in self.off]
        if declared and not found:
            self.refuse_off(declared[0].value)
        if len({entry.value for entry in found}) > 1:
            who = " and ".join(f"{entry.value!r} of {owner(entry)}" for entry in found)
            raise PluginError(f"the role {role!r} is declared by {who}; name the one you want in plugins=(...)")
        return found[0].value if found else None

    def default(self, role: str) -> str | None:
        """Return what ``role`` returns, and None where it raises."""
        try:
            return self.role(role)
        except PluginError:
            return None

    def fills(self, name: str, role: str) -> bool:
        """Whether the plugin called *name* is declared as a default plugin of *role*."""
        return any(entry.name == role and entry.value == name for entry in self.roles)

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
    if not isinstance(plugin, type):
        return f"must be a class (got {type(plugin).__name__})"
    if problem := misfit(plugin):
        return problem
    name: Any = getattr(plugin, "name", None)
    return "" if name == entry.name else f"calls itself {name!r}; the entry point and the class must agree"
