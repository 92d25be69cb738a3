"""Call the hooks of the selected plugins in order, and name the plugin whose hook raised."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import pluggy

from nemo_dist.errors import PluginError
from nemo_dist.planning.validation import near
from nemo_dist.plugin.hookspecs import Hooks
from nemo_dist.plugin.protocol import Plugin

_REVERSED = frozenset({"import_state"})


class _Manager(pluggy.PluginManager):
    """Reads the hooks of a plugin class once, however many of its instances are registered."""

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> Any:
        """Return the options of the hook *name* of *plugin*, or None where it is none."""
        if name in getattr(plugin, "__dict__", ()):
            return super().parse_hookimpl_opts(plugin, name)
        known = _IMPLEMENTED.setdefault(type(plugin), {})
        if name not in known:
            known[name] = super().parse_hookimpl_opts(plugin, name)
        return known[name]


_IMPLEMENTED: WeakKeyDictionary[type, dict[str, Any]] = WeakKeyDictionary()


class PluginCalls:
    """Calls the hooks of *plugins*, given in stage order: ``calls.shard(...)`` calls all their ``shard`` hooks.

    A call returns the list of results that are not None. An exception raised by a hook gets a note with the plugin's
    name. Raises PluginError for a hook that does not exist, for hook arguments that are unknown or have a default, and
    for ``tryfirst``, ``trylast`` or wrappers, which would change the order.
    """

    def __init__(self, plugins: Sequence[Plugin]) -> None:
        self._manager = _Manager("nemo_dist")
        self._manager.add_hookspecs(Hooks)
        for plugin in reversed(plugins):  # pluggy calls the last registered plugin first
            try:
                self._manager.register(plugin, plugin.name)
            except (pluggy.PluginValidationError, ValueError, TypeError) as error:
                raise PluginError(f"plugin {plugin.name!r} does not fit the hooks: {_one_line(error)}") from error
        self._refuse_misspelled()
        self._refuse_hidden_rules()

    def __getattr__(self, name: str) -> Callable[..., list[Any]]:
        def call(**arguments: Any) -> list[Any]:
            return [answer for _, answer in self.each(name, **arguments) if answer is not None]

        return call

    def each(self, hook: str, **arguments: Any) -> Iterator[tuple[str, Any]]:
        """Call *hook* plugin by plugin; yield each plugin's name and result before the next plugin is called."""
        found: pluggy.HookCaller = getattr(self._manager.hook, hook)
        implementations = found.get_hookimpls()  # in the order of registration, which is reversed stage order
        for one in implementations if hook in _REVERSED else reversed(implementations):
            try:
                answer = one.function(**{name: arguments[name] for name in one.argnames})
            except Exception as error:
                error.add_note(f"raised by the {hook} hook of plugin {one.plugin_name!r}")
                raise
            yield one.plugin_name, answer

    def only(self, hook: str, **arguments: Any) -> Any:
        """Return the one result of *hook* that is not None, or None; raise PluginError when there are several."""
        answers = {name: answer for name, answer in self.each(hook, **arguments) if answer is not None}
        if len(answers) > 1:
            raise PluginError(f"plugins {_listed(answers)} both answer {hook}(), which only one may; leave one out")
        return next(iter(answers.values()), None)

    def _refuse_misspelled(self) -> None:
        names = [name for name in vars(Hooks) if not name.startswith("_")]
        for name, hook in vars(self._manager.hook).items():
            if name.startswith("_") or hook.has_spec():
                continue
            for impl in hook.get_hookimpls():
                raise PluginError(
                    f"plugin {impl.plugin_name!r} implements {name}(), which is no hook{near(name, names)} "
                    f"(hooks: {', '.join(names)})"
                )

    def _refuse_hidden_rules(self) -> None:
        """Raise PluginError for a hook with an argument default, ``tryfirst``, ``trylast`` or a wrapper.

        Some versions of pluggy pass an argument that has a default and others do not; the rest would override stage
        order.
        """
        for name, hook in vars(self._manager.hook).items():
            if name.startswith("_"):
                continue
            for impl in hook.get_hookimpls():
                if ignored := sorted(set(impl.kwargnames) & set(hook.spec.argnames)):
                    raise PluginError(
                        f"plugin {impl.plugin_name!r}: {name}() gives a default to {', '.join(map(repr, ignored))}, "
                        "so it might never be passed; remove the default"
                    )
                if impl.tryfirst or impl.trylast or impl.wrapper or impl.hookwrapper:
                    raise PluginError(
                        f"plugin {impl.plugin_name!r}: {name}() sets tryfirst, trylast or wrapper; the order is "
                        "that of the plugins' stages, so set stage instead"
                    )


def _listed(names: Iterable[str]) -> str:
    return " and ".join(map(repr, names))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
