"""The ``distributed:`` section of a configuration: a flat mapping of plain values, read from and written to YAML.

``strategy``, the sizes, the options of the strategy, ``activation_checkpointing``, ``pipeline:`` and ``moe:`` are the
keys of NeMo AutoModel; ``plugins:`` maps further plugins to their options, and ``device_type``, ``timeout_minutes``
and ``ranks`` are those of ``DistributedSetup.build``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from nemo_dist.errors import UnknownNameError
from nemo_dist.planning.sizes import ParallelismSizes
from nemo_dist.planning.validation import near, shown
from nemo_dist.plugin.options import accepted_names, from_mapping
from nemo_dist.plugin.protocol import Plugin, Stage, declared
from nemo_dist.plugin.registry import Registry
from nemo_dist.setup.build_arguments import SCOPE
from nemo_dist.setup.composition import Composition
from nemo_dist.setup.selection import DEFAULT, RECOMPUTE, Selection

# The keys of the section that are keywords of ``build``, by the axis that the plugin must claim.
_CONFIGS = {"pipeline": ("pipeline_config", "pp"), "moe": ("moe_parallel_config", "ep")}
_SIZES = tuple(field.name for field in attrs.fields(ParallelismSizes) if field.name != "roles")
_CODE = ("_target_", "_recursive_", "_convert_")  # of Hydra, for making objects
_FEW = 20  # unknown keys that a message names
_OTHER = ("device_type", "timeout_minutes", "ranks")


def build_keywords(section: Mapping[str, Any], registry: Registry) -> dict[str, Any]:
    """Return the keywords of ``DistributedSetup.build`` for *section*.

    Raises UnknownNameError (a ValueError) that names every unknown key, each with the nearest match, and TypeError for
    a section that is no mapping.
    """
    if not isinstance(section, Mapping):
        raise TypeError(f"the distributed section must be a mapping (got {shown(section)})")
    values = {
        key: None if isinstance(value, str) and value.lower() == "none" else value for key, value in section.items()
    }
    named = values.pop("strategy", None)
    named = DEFAULT if named is None else named
    if not isinstance(named, str):
        raise TypeError(f"strategy must be the name of a strategy (got {shown(named)})")
    strategy = Selection(registry).strategy_type(named)
    config_type = strategy.config_type
    options = [name for name in accepted_names(config_type) if name != RECOMPUTE]
    _refuse_unknown(values, strategy.name, options, registry)
    keywords: dict[str, Any] = {
        "strategy": config_type(**{name: values[name] for name in options if name in values}),
        "parallelism_sizes": ParallelismSizes(**_given(values, _SIZES)),
        RECOMPUTE: False if values.get(RECOMPUTE) is None else values[RECOMPUTE],
        "plugins": tuple(_extras(_given(values, ("plugins",)).get("plugins", ()), registry)),
        **_given(values, _OTHER),
    }
    for key, (keyword, _) in _CONFIGS.items():
        if values.get(key) is not None:
            keywords[keyword] = values[key]
    return keywords


def _given(values: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: values[name] for name in names if values.get(name) is not None}


def _refuse_unknown(values: Mapping[str, Any], strategy: str, options: list[str], registry: Registry) -> None:
    valid = ["strategy", *_SIZES, RECOMPUTE, *_CONFIGS, "plugins", *_OTHER, *options]
    unknown = [key for key in values if key not in valid]
    problems = [
        f"unknown key {shown(key)} for strategy {strategy!r}{_hint(key, valid, registry)}" for key in unknown[:_FEW]
    ]
    if len(unknown) > _FEW:
        problems.append(f"{len(unknown) - _FEW} more")
    if problems:
        raise UnknownNameError(
            "the distributed section has " + "; ".join(problems) + f"; valid keys: {', '.join(valid)}"
        )


def _hint(key: Any, valid: list[str], registry: Registry) -> str:
    """Return what may be meant by an unknown *key*: another strategy's option, or a near match."""
    if key in _CODE:
        return "; no key names code here: write strategy: NAME"
    others = [
        name
        for name in registry
        if registry.stage(name) == Stage.DATA and key in accepted_names(registry.load(name).config_type)
    ]
    return f"; it is an option of {' and '.join(map(repr, others))}" if others else near(key, valid)


def _extras(plugins: Any, registry: Registry) -> Iterator[Any]:
    """Yield the config of each plugin under ``plugins:``, a mapping from names to options or a list of names."""
    if not isinstance(plugins, Mapping | list | tuple):
        raise TypeError(f"plugins must be a mapping from names to options, or a list of names (got {shown(plugins)})")
    named = plugins.items() if isinstance(plugins, Mapping) else [(name, None) for name in plugins]
    for name, options in named:
        config_type = registry.load(name).config_type
        yield from_mapping(config_type, {} if options is None else options, f"plugins.{name}")


def section_of(setup: Composition, registry: Registry) -> dict[str, Any]:
    """Return the section from which ``build`` makes *setup* again: plain values, without defaults.

    Raises ValueError for a setup that no section can describe: one with a plugin that is not installed, or with an
    option that is an object of the user's own.
    """
    strategy = setup.strategy
    if strategy is None:
        raise ValueError("the setup wraps a device mesh without a strategy, which a section cannot describe")
    section: dict[str, Any] = {"strategy": _installed(strategy, registry).name}
    section |= _options(setup.parallelism_sizes, "the sizes", without=("roles",))
    section |= _options(strategy.config, strategy.name, without=(RECOMPUTE,))
    further: dict[str, Any] = {}
    for plugin in setup.plugins:
        if plugin is not strategy:
            _describe(_installed(plugin, registry), setup, registry, section, further)
    section |= {"plugins": further} if further else {}
    return section | {name: _plain(getattr(setup, name), name) for name in _OTHER if getattr(setup, name) is not None}


def _describe(
    plugin: Plugin, setup: Composition, registry: Registry, section: dict[str, Any], further: dict[str, Any]
) -> None:
    """Add *plugin* to *section*: under the key of the role that it fills by default, else under ``plugins:``.

    A plugin that ``build`` would select in the same form by itself is left out.
    """
    if registry.default(RECOMPUTE) == plugin.name:
        scope = getattr(setup.strategy_config, SCOPE, None)
        settings = {"mode": setup.recompute_mode} | ({} if scope is None else {"scope": scope})
        if plugin.config == type(plugin.config)(**settings):
            section[RECOMPUTE] = setup.recompute_mode
            return
    options = _options(plugin.config, plugin.name)
    for key, (_, role) in _CONFIGS.items():
        if registry.default(role) == plugin.name:
            section |= {key: options} if options else {}
            return
    if plugin.config != _default(plugin, setup, registry):
        further[plugin.name] = options


def _default(plugin: Plugin, setup: Composition, registry: Registry) -> Any:
    """Return the config with which ``build`` would select *plugin* for an axis by default, or None if it would not."""
    delegates = declared(setup.strategy, "delegates")
    usual = type(setup.strategy_config)()
    for axis in (axis.name for axis in setup.plan.wide if axis.name in plugin.axes):
        if registry.default(axis) == plugin.name:
            given = {name: getattr(setup.strategy_config, name) for name in delegates.get(axis, ())}
            return type(plugin.config)(
                **{name: value for name, value in given.items() if value != getattr(usual, name)}
            )
    return None


def _installed(plugin: Plugin, registry: Registry) -> Plugin:
    if plugin.name not in list(registry) or registry.load(plugin.name) is not type(plugin):
        raise ValueError(f"plugin {plugin.name!r} is not installed, so a section cannot name it; install it first")
    return plugin


def _options(config: Any, what: str, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the fields of *config* that are not their defaults, as plain values."""
    if not attrs.has(type(config)):
        raise ValueError(f"the config of {what} is no attrs class, so its options cannot be read (got {shown(config)})")
    default = {field.name: getattr(type(config)(), field.name) for field in attrs.fields(type(config))}
    return {
        name: _plain(getattr(config, name), f"{what}.{name}")
        for name, usual in default.items()
        if name not in without and getattr(config, name) != usual
    }


def _plain(value: Any, what: str) -> Any:
    """Return *value* in plain types for YAML: dtypes as names, policies as mappings; else raise ValueError."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{what}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, what) for item in value]
    if type(value).__name__ == "dtype":
        return str(value).removeprefix("torch.")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: _plain(getattr(value, field.name), f"{what}.{field.name}")
            for field in dataclasses.fields(value)
        }
    raise ValueError(f"{what} is {shown(value)}, which a section cannot write; use names and numbers instead")
