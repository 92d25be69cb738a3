"""What a plugin class declares: required attributes, optional ones with their defaults, and the order of plugins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import Any, ClassVar, Protocol, runtime_checkable

from nemo_dist.planning.validation import FrozenMapping
from nemo_dist.planning.views import Role


class Stage(IntEnum):
    """When a plugin acts on the model, innermost transformation first; a third party may take a value between."""

    SPLIT = 10  # pipeline: one module becomes several parts
    TENSOR = 20
    EXPERT = 30
    CONTEXT = 40
    RECOMPUTE = 50
    COMPILE = 60
    DATA = 70  # FSDP2, DDP, Megatron-FSDP: the outermost, exactly one is selected


@runtime_checkable
class Plugin(Protocol):
    """What the core asks of a plugin besides its hooks: an ``attrs.frozen(eq=False)`` class with these attributes.

    ``axes`` are the mesh axes that it claims. ``composes_with`` matters for a strategy (stage ``DATA``): the axes and
    features of other plugins that it works with. A config class names its plugin in a class variable ``plugin``.

    Optional are, read by :func:`declared`:

    ``roles``: for each axis of its own (from ``ParallelismSizes(extra=...)``) that takes ranks of the dense mesh, the
    :class:`Role` that says what they split.
    ``delegates``: for an axis or keyword of ``build``, the names of the options of its config that belong to the plugin
    of that axis or keyword.
    ``features``: what this instance does that another plugin may not be proven with, each with the option that asked
    for it: ``{"compile": "enable_compile=True"}``. Ours are "compile", "offload", "sequence_parallel",
    "reshard_after_forward", "reduce_every_backward" and "activation_checkpointing:selective".
    ``compute_dtype``: of a strategy, the name of the dtype of parameters in a forward; None is that of the stored ones.
    """

    name: ClassVar[str]
    config_type: ClassVar[type]
    stage: ClassVar[int]
    axes: ClassVar[frozenset[str]]
    composes_with: ClassVar[frozenset[str]]

    @property
    def config(self) -> Any:
        """The options of this plugin, a ``config_type``."""


_OPTIONAL: Mapping[str, Any] = {
    "roles": FrozenMapping[Role](),
    "delegates": FrozenMapping[tuple[str, ...]](),
    "features": FrozenMapping[str](),
    "compute_dtype": None,
}


def declared(plugin: Any, name: str) -> Any:
    """Return the optional attribute *name* of *plugin* (a class or an instance; None has none), or its default."""
    return getattr(plugin, name, _OPTIONAL[name])


def claimants(plugins: Iterable[Plugin], axis: str) -> list[Plugin]:
    """Return those of *plugins* that claim *axis*, in their order."""
    return [plugin for plugin in plugins if axis in plugin.axes]


def claimant(plugins: Iterable[Plugin], axis: str) -> Plugin | None:
    """Return the first of *plugins* that claims *axis*, or None."""
    return next(iter(claimants(plugins, axis)), None)


def asked_for(plugins: Iterable[Plugin], feature: str) -> str | None:
    """Return the option by which one of *plugins* was asked for *feature*, or None when none has it."""
    found = (declared(plugin, "features").get(feature) for plugin in plugins)
    return next((option for option in found if option is not None), None)


def strategy_of(plugins: Iterable[Plugin]) -> Plugin | None:
    """Return the strategy among *plugins*: the one at ``Stage.DATA``."""
    return next((plugin for plugin in plugins if plugin.stage == Stage.DATA), None)
