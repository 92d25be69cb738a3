"""Read a model for a search: the whole of it on the meta device, and one of few layers that has every kind of block."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import attrs
import torch
from torch import nn

from nemo_dist import hf_model
from nemo_dist.models.meta_model import meta_model
from nemo_dist.plugin.comm_estimate import stacked_experts
from nemo_dist.plugin.mixed_precision import dtype_name

_LAYERS = "num_hidden_layers"
Kind = tuple[Any, ...]  # what blocks that hold and compute the same have in common


@attrs.frozen(eq=False, slots=False)
class SearchedModel:
    """A model on the meta device: ``whole``, and ``slim``, its first layers with at least one block of every kind.

    Kinds that are between the first and the last block of the whole are between those of the slim one, too: what is
    done around all blocks may be done in the first or the last one.
    """

    config: Any
    dtype: str = "float32"

    @cached_property
    def whole(self) -> Any:
        """The model with all layers."""
        return self._on_meta(self.config)

    def _on_meta(self, config: Any) -> Any:
        trained = copy.deepcopy(config)
        trained.architectures = None  # may name a class without a loss; that of the config has one
        return meta_model(trained, getattr(torch, self.dtype))

    @cached_property
    def kinds(self) -> Mapping[str, Kind]:
        """The kind of every block, by name."""
        return kinds(self.whole)

    @cached_property
    def routed(self) -> frozenset[Kind]:
        """The kinds of blocks whose tokens go to experts, which ``ep`` shares."""
        blocks = hf_model.blocks(self.whole).items()
        return frozenset(self.kinds[name] for name, block in blocks if any(map(stacked_experts, block.modules())))

    @cached_property
    def slim(self) -> Any:
        """The model with few layers; the whole one where its config cannot be shortened so that it keeps its kinds."""
        wanted = self.kinds
        layers = getattr(self.config.get_text_config(), _LAYERS, None)
        if not isinstance(layers, int):
            return self.whole
        for count in range(1, min(layers, 64)):
            found = self._on_meta(_shortened(self.config, count))
            own = kinds(found)
            alike = all(wanted.get(name) == kind for name, kind in own.items())
            if alike and set(own.values()) == set(wanted.values()) and _between(own) == _between(wanted):
                return found
        return self.whole


def _between(kinds_of: Mapping[str, Kind]) -> set[Kind]:
    return set(list(kinds_of.values())[1:-1])


def kinds(model: nn.Module) -> dict[str, Kind]:
    """Return the kind of every block of *model* by name: its class, the shapes in it, and its type of layer."""
    blocks = hf_model.blocks(model)
    types = getattr(model.config.get_text_config(), "layer_types", None) or ()  # type: ignore[operator, union-attr]
    found: dict[str, Kind] = {}
    for name, block in blocks.items():
        place = name.rpartition(".")[2]
        layer = types[int(place)] if place.isdigit() and int(place) < len(types) else None
        shapes = tuple((own, tuple(p.shape), dtype_name(p.dtype)) for own, p in block.named_parameters())
        found[name] = (hf_model.class_name(block), layer, shapes)
    return found


def _shortened(config: Any, count: int) -> Any:
    """Return a copy of *config* with the first *count* layers only."""
    short = copy.deepcopy(config)
    text = short.get_text_config()
    layers = getattr(text, _LAYERS)
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == layers and not name.startswith("_"):
            setattr(text, name, value[:count])
    setattr(text, _LAYERS, count)
    return short
