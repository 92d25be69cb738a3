"""Write a topology as what a user pastes: the call of ``build``, and the ``distributed:`` section of a recipe."""

from __future__ import annotations

from typing import Any

import attrs
import yaml

from nemo_dist.planning.sizes import ParallelismSizes
from nemo_dist.plugin.options import option_names
from nemo_dist.search.enumeration import Topology
from nemo_dist.setup.selection import RECOMPUTE


def call_text(topology: Topology) -> str:
    """Return the call of ``DistributedSetup.build`` that makes *topology*, with the imports that it needs."""
    configs = [topology.strategy, *topology.plugins]
    named = [config for config in configs if _options(config) or config is not topology.strategy]
    lines = ["from nemo_dist import DistributedSetup, ParallelismSizes"]
    homes: dict[str, list[str]] = {}
    for config in named:
        homes.setdefault(type(config).__module__.partition(".")[0], []).append(type(config).__name__)
    lines += [f"from {home} import {', '.join(dict.fromkeys(names))}" for home, names in homes.items()]
    plain = not _options(topology.strategy)
    arguments = [f"strategy={topology.strategy.plugin!r}" if plain else f"strategy={_text(topology.strategy)}"]
    arguments.append(f"parallelism_sizes=ParallelismSizes({', '.join(_sizes(topology.parallelism_sizes))})")
    if topology.activation_checkpointing:
        arguments.append(f"{RECOMPUTE}={topology.activation_checkpointing!r}")
    if topology.plugins:
        arguments.append(f"plugins=({', '.join(map(_text, topology.plugins))},)")
    inside = "".join(f"    {argument},\n" for argument in arguments)
    return "\n".join([*lines, f"setup = DistributedSetup.build(\n{inside})"])


def section_text(topology: Topology) -> str | None:
    """Return the ``distributed:`` section, or None where a plugin is not installed, which no section can name."""
    try:
        section = topology.build().to_dict()
    except ValueError:
        return None
    return str(yaml.safe_dump({"distributed": section}, sort_keys=False)).rstrip()


def short(topology: Topology) -> str:
    """Return the sizes and options of *topology* in a few words."""
    words = [str(topology.strategy.plugin)]
    words += [text.replace("_size=", " ").replace("extra=", "") for text in _sizes(topology.parallelism_sizes)]
    for config in (topology.strategy, *topology.plugins):
        words += [f"{name.removeprefix('pp_')} {value}" for name, value in _options(config).items()]
    mode = topology.activation_checkpointing
    return ", ".join([*words, *([f"recompute {'full' if mode is True else mode}"] if mode else [])])


def _sizes(sizes: ParallelismSizes) -> list[str]:
    found = {
        field.name: getattr(sizes, field.name) for field in attrs.fields(ParallelismSizes) if field.name != "roles"
    }
    default = ParallelismSizes()
    own = {name: value for name, value in found.items() if value != getattr(default, name)}
    return [f"{name}={dict(value) if name == 'extra' else value!r}" for name, value in own.items()]


def _options(config: Any) -> dict[str, Any]:
    """Return the options of *config* that differ from its defaults; none for a plugin instance."""
    if not hasattr(config, "to_dict"):
        return {}
    default = type(config)()
    return {
        name: getattr(config, name)
        for name in option_names(type(config))
        if getattr(config, name) != getattr(default, name)
    }


def _text(config: Any) -> str:
    return f"{type(config).__name__}({', '.join(f'{name}={value!r}' for name, value in _options(config).items())})"
