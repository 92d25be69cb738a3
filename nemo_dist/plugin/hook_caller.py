"""Call the hooks of the selected plugins, and say whose fault it is when one fails."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pluggy

from nemo_dist.errors import PluginError
from nemo_dist.planning.validation import near
from nemo_dist.plugin.hookspecs import Hooks
from nemo_dist.plugin.registry import Plugin

_REVERSED = frozenset({"import_state"})


class PluginCalls:
    """One pluggy manager that holds only *plugins*; ``calls.shard(...)`` reaches them in stage order.

    Raises PluginError for a hook that does not exist, for unknown or defaulted arguments, and for an order other than
    stages.
    """

    def __init__(self, plugins: Sequence[Plugin]) -> None:
        self._manager = pluggy.PluginManager("nemo_dist")
        self._manager.add_hookspecs(Hooks)
        for plugin in reversed(plugins):  # pluggy calls the last registered first
            try:
                self._manager.register(plugin, plugin.name)
            except (pluggy.PluginValidationError, ValueError, TypeError) as error:
                raise PluginError(f"plugin {plugin.name!r} does not fit the hooks: {_one_line(error)}") from error
        self._refuse_misspelled()
        self._refuse_hidden_rules()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        hook: pluggy.HookCaller = getattr(self._manager.hook, name)

        def call(**kwargs: Any) -> Any:
            with _blame(hook):
                return _backwards(hook, kwargs) if name in _REVERSED else hook(**kwargs)

        return call

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
        """A default is dropped by some versions of pluggy and passed by others; tryfirst and trylast hide the order."""
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


def _backwards(hook: pluggy.HookCaller, kwargs: dict[str, Any]) -> list[Any]:
    """Call the outermost plugin first; pluggy itself knows only the one order."""
    answers = [impl.function(**{name: kwargs[name] for name in impl.argnames}) for impl in hook.get_hookimpls()]
    return [answer for answer in answers if answer is not None]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


@contextmanager
def _blame(hook: pluggy.HookCaller) -> Iterator[None]:
    """Note on an exception which plugin's hook raised it."""
    try:
        yield
    except Exception as error:
        names = {impl.function.__code__: impl.plugin_name for impl in hook.get_hookimpls()}
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if frame.f_code in names:
                error.add_note(f"raised by the {hook.name} hook of plugin {names[frame.f_code]!r}")
        raise
