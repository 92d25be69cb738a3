"""What a plugin class declares: required attributes, optional ones with their defaults, and its stage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import Any, ClassVar, Protocol, runtime_checkable

from nemo_dist.planning.validation import FrozenMapping
from nemo_dist.planning.views import Role


class Stage(IntEnum):
    """The order in which plugins act on the model, innermost first; a third-party plugin may use a value in between."""

    SPLIT = 10  # pipeline: one module becomes several parts
    TENSOR = 20
    EXPERT = 30
    CONTEXT = 40
    RECOMPUTE = 50
    COMPILE = 60
    DATA = 70  # FSDP2, DDP, Megatron-FSDP: the outermost, exactly one is selected


@runtime_checkable
class Plugin(Protocol):
    """What the core requires of a plugin besides its hooks: an ``attrs.frozen(eq=False)`` class with these attributes.

    ``axes`` are the mesh axes that it claims. ``composes_with``: for a strategy (stage ``DATA``), the axes, features
    and names of other plugins that it works with; for another plugin, names of strategies. A config class names its
    plugin in a class variable ``plugin``.

    Optional attributes, read by :func:`declared`:

    ``roles``: for each of its axes that is in ``ParallelismSizes(extra=...)`` and part of the dense mesh, the
    :class:`Role` that says what its ranks split.

    ``delegates``: for an axis or a keyword of ``build``, the options on this plugin's config that are passed to the
    plugin of that axis or keyword.

    ``features``: what this instance does that another plugin may not have been tested with, each with the option that
    turned it on: ``{"compile": "enable_compile"}``. Ours are "compile", "offload", "sequence_parallel",
    "reshard_after_forward", "reduce_every_backward" and "activation_checkpointing:selective".

    ``compute_dtype``: for a strategy, the name of the dtype of parameters in a forward; None is the dtype that they are
    stored in.

    ``parameter_device``: for a strategy, the type of the device that keeps the shards of parameters between forwards;
    None is that of the mesh.

    ``contract``: the version of the contract that the plugin was written for, 1 without it.

    ``exact``: False for a plugin that does not compute what one process computes, by design; it says so in
    ``setup.explain()``, and the conformance kit then asks for the bound that it keeps.

    ``replicas_differ``: True for a plugin whose ranks may hold different values of what others call one parameter. The
    replicas are then not compared, a save takes all tensors of one replica, and the plugin keeps what else a resumed
    run needs in ``PluginState.own``.
    """

    name: ClassVar[str]
    config_type: ClassVar[type]
    stage: ClassVar[int]
    axes: ClassVar[frozenset[str]]
    composes_with: ClassVar[frozenset[str]]

    @property
    def config(self) -> Any:
        """The options of this plugin, an instance of ``config_type``."""


_OPTIONAL: Mapping[str, Any] = {
    "roles": FrozenMapping[Role](),
    "delegates": FrozenMapping[tuple[str, ...]](),
    "features": FrozenMapping[str](),
    "compute_dtype": None,
    "parameter_device": None,
    "contract": 1,
    "exact": True,
    "replicas_differ": False,
}


def declared(plugin: Any, name: str) -> Any:
    """Return the optional attribute *name* of *plugin* (a class, an instance or None), or its default."""
    return getattr(plugin, name, _OPTIONAL[name])


def claimants(plugins: Iterable[Plugin], axis: str) -> list[Plugin]:
    """Return those of *plugins* that claim *axis*, in the given order."""
    return [plugin for plugin in plugins if axis in plugin.axes]


def claimant(plugins: Iterable[Plugin], axis: str) -> Plugin | None:
    """Return the first of *plugins* that claims *axis*, or None."""
    return next(iter(claimants(plugins, axis)), None)


def asked_for(plugins: Iterable[Plugin], feature: str) -> str | None:
    """Return the option that turned on *feature* in one of *plugins*, or None when none has the feature."""
    found = (declared(plugin, "features").get(feature) for plugin in plugins)
    return next((option for option in found if option is not None), None)


def strategy_of(plugins: Iterable[Plugin]) -> Plugin | None:
    """Return the strategy among *plugins*, the one at ``Stage.DATA``, or None."""
    return next((plugin for plugin in plugins if plugin.stage == Stage.DATA), None)
