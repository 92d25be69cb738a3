"""Judge what a plugin class or instance declares about itself, before anything is done with it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from nemo_dist.planning.validation import shown
from nemo_dist.plugin.contract import CONTRACT
from nemo_dist.plugin.protocol import Stage, declared

_REQUIRED = ("name", "config_type", "stage", "axes", "composes_with")
_MAPPINGS = ("roles", "delegates", "features")
_SWITCHES = ("exact", "replicas_differ")
_NAME = re.compile(r"[a-z][a-z0-9_]*")


def misfit(plugin: Any) -> str:
    """Return why *plugin*, a class or an instance, is not a valid plugin, as the end of a sentence; or an empty string.

    Attributes that are properties are judged on an instance only.
    """
    missing = [name for name in _REQUIRED if not hasattr(plugin, name)]
    if missing:
        return f"lacks the class attribute {', '.join(map(repr, missing))}; see nemo_dist.Plugin"
    return (
        misnamed(plugin.name) or _wrong_version(plugin) or _wrong_stage(plugin) or _wrong_sets(plugin) or _wrong(plugin)
    )


def misnamed(name: Any) -> str:
    """Return why *name* cannot be that of a plugin, or an empty string."""
    if isinstance(name, str) and _NAME.fullmatch(name):
        return ""
    plain = re.sub(r"\W+", "_", name.strip().lower()) if isinstance(name, str) else ""
    way = f"; call it {plain!r}" if _NAME.fullmatch(plain) else ""
    return f"has the name {shown(name)}; a name is lower-case letters, digits and underscores{way}"


def _wrong_version(plugin: Any) -> str:
    version = declared(plugin, "contract")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        return f"has contract = {shown(version)}; it is the version of the contract, an int from 1 to {CONTRACT}"
    if version > CONTRACT:
        return (
            f"was written for version {version} of the contract, and this nemo_dist has version {CONTRACT}; upgrade "
            "nemo-dist, or install an older version of the plugin"
        )
    return ""


def _wrong_stage(plugin: Any) -> str:
    stage = plugin.stage
    if isinstance(stage, bool) or not isinstance(stage, int):
        return f"has stage = {shown(stage)}; a stage is a member of nemo_dist.Stage, or an int between two of them"
    if not 0 <= stage <= Stage.DATA:
        return (
            f"has stage = {int(stage)}, and stages go from 0 to Stage.DATA, {int(Stage.DATA)}: the strategy acts last, "
            "so that what others made of the model is what it shards; choose a stage before it"
        )
    return ""


def _wrong_sets(plugin: Any) -> str:
    for name in ("axes", "composes_with"):
        value = getattr(plugin, name)
        if not isinstance(value, set | frozenset) or not all(isinstance(item, str) for item in value):
            written = f"frozenset({{{value!r}}})" if isinstance(value, str) else "frozenset({...})"
            return f"has {name} = {shown(value)}, which must be a set of names; write {written}"
    return ""


def _wrong(plugin: Any) -> str:
    if not isinstance(plugin.config_type, type):
        return f"has config_type = {shown(plugin.config_type)}, which must be the class of its options"
    for name in _MAPPINGS:
        value = declared(plugin, name)
        if not isinstance(value, Mapping | property):
            return f"has {name} = {shown(value)}, which must be a mapping; see nemo_dist.Plugin"
    for name in _SWITCHES:
        value = declared(plugin, name)
        if not isinstance(value, bool | property):
            return f"has {name} = {shown(value)}, which must be True or False"
    return ""
