"""Validate how a plugin changed the list of model parts in its ``shard`` or ``wrap`` hook."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nemo_dist.errors import PluginError
from nemo_dist.hf_model import inner_model, name_root

if TYPE_CHECKING:
    from torch import nn


def judge_parts(plugin: str, hook: str, parts: Sequence[nn.Module], models: Sequence[nn.Module]) -> None:
    """Raise PluginError when *hook* of *plugin* dropped one of *models*, or left parameters outside of them.

    Each part must be a transformers model or a module that wraps one. A parameter of the wrapper itself would have no
    name in a checkpoint, and no strategy would shard or reduce it.
    """
    try:
        held = {id(inner_model(part)) for part in parts}
    except ValueError as error:
        raise PluginError(f"plugin {plugin!r}: {hook}() left a part that {error}") from error
    if lost := [type(model).__name__ for model in models if id(model) not in held]:
        raise PluginError(
            f"plugin {plugin!r}: {hook}() replaced {', '.join(lost)} by a module that does not hold it; edit the model "
            "in place, append parts, or replace it by a module that wraps it"
        )
    for part in parts:
        inside = {id(parameter) for parameter in name_root(part).parameters()}
        foreign = [name for name, parameter in part.named_parameters() if id(parameter) not in inside]
        if foreign:
            raise PluginError(
                f"plugin {plugin!r}: {hook}() left parameters outside of the model ({', '.join(foreign)}); register "
                "them on one of its modules, or keep them as state of the plugin"
            )
