"""Judge what the hooks of plugins return, and what the callables of a runtime part return and raise.

So a wrong result is an error that names the plugin, where it came from, and not a puzzle in a later step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import wraps
from numbers import Real
from typing import Any

import attrs

from nemo_dist.errors import PluginError
from nemo_dist.planning.validation import shown
from nemo_dist.planning.views import View
from nemo_dist.plugin.comm_estimate import Traffic
from nemo_dist.plugin.hookspecs import PluginState, RuntimePart
from nemo_dist.plugin.step_schedule import StepSchedule

Test = Callable[[Any], bool]


def _listing(kind: type) -> Test:
    return lambda found: isinstance(found, list | tuple) and all(isinstance(item, kind) for item in found)


def _naming(kind: type) -> Test:
    return lambda found: (
        isinstance(found, Mapping)
        and all(isinstance(name, str) and isinstance(value, kind) for name, value in found.items())
    )


def _having(*names: str) -> Test:
    return lambda found: all(hasattr(found, name) for name in names)


_NOTHING: tuple[str, Test] = ("nothing, as it edits what it is given in place", lambda found: False)
# What each hook returns, where it does not return None.
_HOOKS: Mapping[str, tuple[str, Test]] = {
    "views": ("a list of nemo_dist.View", _listing(View)),
    "validate": ("a list of sentences", _listing(str)),
    "explain": ("one line of text", lambda found: isinstance(found, str)),
    "traffic": ("a list of nemo_dist.plugin.comm_estimate.Traffic", _listing(Traffic)),
    "schedule": ("a nemo_dist.plugin.step_schedule.StepSchedule", lambda found: isinstance(found, StepSchedule)),
    "memory": _NOTHING,
    "agree": ("a mapping from names to text", _naming(str)),
    "shard": _NOTHING,
    "wrap": _NOTHING,
    "present": ("an object with 'parts'", _having("parts")),
    "runtime": ("a nemo_dist.RuntimePart", lambda found: isinstance(found, RuntimePart)),
    "export_state": _NOTHING,
    "import_state": _NOTHING,
}
_OPTIMIZER = ("step", "zero_grad", "param_groups", "state")
# What the callables of a RuntimePart and of a PluginState return, where it matters.
_CALLABLES: Mapping[str, tuple[str, Test]] = {
    "batch": ("the batch, a mapping", lambda found: isinstance(found, Mapping)),
    "no_sync": ("a context manager", _having("__enter__", "__exit__")),
    "unreduced": ("a mapping from parameters to functions", lambda found: isinstance(found, Mapping)),
    "engine": ("the loss, a tensor", _having("detach")),
    "optimizer": (f"an optimizer, with {', '.join(_OPTIMIZER)}", _having(*_OPTIMIZER)),
    "metrics": ("a mapping from names to numbers", _naming(Real)),
    "tensors": (
        "a mapping from kinds to mappings from parameter names to tensors",
        lambda found: (
            isinstance(found, Mapping) and all(_naming(object)(one) for one in found.values() if one is not None)
        ),
    ),
    "accepts": ("a sentence or None", lambda found: found is None or isinstance(found, str)),
}
# The fields of a RuntimePart that are not callables.
_VALUES: Mapping[str, tuple[str, Test]] = {
    "lockstep": ("True or False", lambda found: isinstance(found, bool)),
    "needs_loss": ("a sentence, or empty", lambda found: isinstance(found, str)),
    "rows": ("a number of rows, 0 for all", lambda found: isinstance(found, int) and found >= 0),
    "norm_axes": (
        "a tuple of axes",
        lambda found: isinstance(found, Collection) and not isinstance(found, str) and _listing(str)(list(found)),
    ),
    "norm_skip": ("a collection of parameters", lambda found: isinstance(found, Collection)),
    "state": ("a nemo_dist.PluginState", lambda found: found is None or isinstance(found, PluginState)),
}


def judge_result(plugin: str, hook: str, result: Any) -> None:
    """Raise PluginError for a *result* of *hook* that is not what the hook returns; None always is."""
    words, test = _HOOKS[hook]
    if result is None:
        return
    if not test(result):
        raise PluginError(
            f"plugin {plugin!r}: {hook}() must return {words} (got {shown(result)} of type {type(result).__name__})"
        )
    if isinstance(result, RuntimePart):
        _judge_part(plugin, result)


def _judge_part(plugin: str, part: RuntimePart) -> None:
    for field in attrs.fields(RuntimePart):
        value = getattr(part, field.name)
        words, test = _VALUES.get(field.name, ("a callable or None", lambda found: found is None or callable(found)))
        if not test(value):
            raise PluginError(f"plugin {plugin!r}: RuntimePart.{field.name} must be {words} (got {shown(value)})")


def named_part(plugin: str, part: RuntimePart) -> RuntimePart:
    """Return *part* with callables that judge what they return, and name *plugin* in a note to what they raise."""
    return attrs.evolve(part, **_named_fields(plugin, part))


def named_state(plugin: str, state: PluginState) -> PluginState:
    """Return *state* with callables that judge what they return, and name *plugin* in a note to what they raise."""
    return attrs.evolve(state, **_named_fields(plugin, state))


def _named_fields(plugin: str, part: Any) -> dict[str, Any]:
    fields = {field.name: getattr(part, field.name) for field in attrs.fields(type(part))}
    return {name: _named(plugin, name, call) for name, call in fields.items() if callable(call)}


def _named(plugin: str, field: str, call: Callable[..., Any]) -> Callable[..., Any]:
    words, test = _CALLABLES.get(field, ("", lambda found: True))

    @wraps(call, updated=())
    def named(*args: Any) -> Any:
        try:
            found = call(*args)
        except Exception as error:
            error.add_note(f"raised by {field} of plugin {plugin!r}")
            raise
        if not test(found):
            raise PluginError(f"plugin {plugin!r}: {field}() must return {words} (got {shown(found)})")
        return found

    return named
