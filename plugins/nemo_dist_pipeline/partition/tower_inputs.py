"""Leave out of a later stage what only towers read: pixels and sound, of which the first stage makes embeddings.

Given to a later stage, whose towers are zeros, they would change nothing and cost the time of the towers.
"""

from __future__ import annotations

import inspect
from typing import Any

from nemo_dist.hf_model import has_towers, is_media, is_own_code, plain_class

_NAMES = "_nemo_dist_tower_inputs"  # in the model's __dict__


def note_tower_inputs(model: Any, block: str) -> None:
    """Note which arguments of *model*, a whole one, only its towers read; *block* is the name of its first block.

    Known where all code around the blocks is that of transformers, and has towers: these are the floating ones that it
    takes by name. What code of the user's own does with an input is not known, and neither is one that is handed on to
    the blocks.
    """
    parts = block.split(".")
    around = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) - 1)]
    names: frozenset[str] = frozenset()
    if has_towers(model) and not any(is_own_code(module) for module in around):
        names = frozenset(name for module in around for name in _taken(module))
    vars(model)[_NAMES] = names


def without_media(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return *inputs* without those that only towers of *model*, a stage, read."""
    names: frozenset[str] = vars(model)[_NAMES]
    return {name: value for name, value in inputs.items() if name not in names or not is_media(name, value)}


def _taken(module: Any) -> list[str]:
    kind: Any = plain_class(module)
    parameters = inspect.signature(kind.forward).parameters.values()
    return [one.name for one in parameters if one.kind is not one.VAR_KEYWORD]
