"""Call the hooks of the selected plugins in order, and name the plugin whose hook raised."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import pluggy

from nemo_dist.errors import PluginError
from nemo_dist.planning.validation import near
from nemo_dist.plugin import contract
from nemo_dist.plugin.hookspecs import Hooks, hookimpl
from nemo_dist.plugin.protocol import Plugin, declared
from nemo_dist.plugin.results import judge_result

HOOKS = tuple(name for name in vars(Hooks) if not name.startswith("_"))  # in the order of a run
_REVERSED = frozenset({"import_state"})


def hooks_of(plugin: Any) -> list[str]:
    """Return the names of the methods of *plugin*, a class or an instance, that are marked as hooks."""
    kind = plugin if isinstance(plugin, type) else type(plugin)
    return [name for name in dir(kind) if _is_marked(getattr(kind, name, None))]


def arguments_of(hook: str) -> list[str]:
    """Return the arguments that *hook* may take."""
    return list(inspect.signature(getattr(Hooks, hook)).parameters)[1:]


_ACTING = frozenset(hook for hook in HOOKS if "parts" in arguments_of(hook))  # who changes a run is given its parts


def acts(plugin: Any) -> bool:
    """Whether *plugin* has a hook that changes the model, a step or a checkpoint."""
    return not _ACTING.isdisjoint(hooks_of(plugin))


def _is_marked(method: Any) -> bool:
    return getattr(method, f"{hookimpl.project_name}_impl", None) is not None


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
    name, and a result of the wrong type raises PluginError. Making one raises PluginError for a hook that does not
    exist or is gone, for a method named like a hook that is not marked as one, for hook arguments that are unknown or
    have a default, and for ``tryfirst``, ``trylast`` or wrappers, which would change the order.
    """

    def __init__(self, plugins: Sequence[Plugin]) -> None:
        self._manager = _Manager("nemo_dist")
        self._manager.add_hookspecs(Hooks)
        for plugin in plugins:
            _judge_hooks(plugin)
        for plugin in reversed(plugins):  # pluggy calls the last registered plugin first
            try:
                self._manager.register(plugin, plugin.name)
            except Exception as error:  # whatever a property of the plugin raises, too
                raise PluginError(f"plugin {plugin.name!r} does not fit the hooks: {_one_line(error)}") from error
        self._refuse_hidden_rules()

    def __deepcopy__(self, memo: object) -> PluginCalls:
        """Return this object: a copy of a model has the plugins that the model has."""
        return self

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
            judge_result(one.plugin_name, hook, answer)
            yield one.plugin_name, answer

    def only(self, hook: str, **arguments: Any) -> Any:
        """Return the one result of *hook* that is not None, or None; raise PluginError when there are several."""
        answers = {name: answer for name, answer in self.each(hook, **arguments) if answer is not None}
        if len(answers) > 1:
            raise PluginError(f"plugins {_listed(answers)} both answer {hook}(), which only one may; leave one out")
        return next(iter(answers.values()), None)

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


def _judge_hooks(plugin: Plugin) -> None:
    """Raise PluginError for a hook, or an argument of one, that does not exist, and for a hook without its mark."""
    marked = hooks_of(plugin)
    for name in HOOKS:
        if name in marked or not callable(getattr(type(plugin), name, None)):
            continue
        if contract.ADDED.get(name, 1) <= declared(plugin, "contract"):
            raise PluginError(
                f"plugin {plugin.name!r} has a method {name}() that is named like a hook and is not marked as one, so "
                "it would never be called; put @hookimpl of nemo_dist above it, or rename it"
            )
    for name in marked:
        _judge_hook(plugin, name)


def _judge_hook(plugin: Plugin, name: str) -> None:
    what = f"plugin {plugin.name!r} implements {name}(), which"
    if name not in HOOKS and name in contract.REMOVED:
        raise PluginError(f"{what} is no hook any more: {contract.REMOVED[name]}")
    if name not in HOOKS:
        raise PluginError(f"{what} is no hook{near(name, HOOKS)} (hooks: {', '.join(HOOKS)})")
    valid = arguments_of(name)
    for argument, parameter in inspect.signature(getattr(plugin, name)).parameters.items():
        if parameter.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
            raise PluginError(
                f"plugin {plugin.name!r}: {name}() takes {parameter}, and a hook gets the arguments that it names, one "
                f"by one; name those that it needs (arguments: {', '.join(valid)})"
            )
        if argument in valid:
            continue
        gone = contract.REMOVED.get(f"{name}.{argument}")
        way = f" any more: {gone}" if gone else f"{near(argument, valid)} (arguments: {', '.join(valid)})"
        raise PluginError(f"{what} has no argument {argument!r}{way}")


def _listed(names: Iterable[str]) -> str:
    return " and ".join(map(repr, names))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
