"""Read a model for a search: the whole of it on the meta device, and one of few layers that has every kind of block."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import attrs
import torch
import transformers
from torch import nn

from nemo_dist import hf_model
from nemo_dist.models.meta_model import making_a_model
from nemo_dist.plugin.mixed_precision import dtype_name

_LAYERS = "num_hidden_layers"
_AUTO: tuple[tuple[Any, Any], ...] = (
    (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.AutoModelForCausalLM),
    (transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, transformers.AutoModelForImageTextToText),
    (transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, transformers.AutoModelForSequenceClassification),
)
Kind = tuple[Any, ...]  # what blocks that hold and compute the same have in common


def on_meta(config: Any, dtype: str) -> Any:
    """Return the model of *config* on the meta device, with parameters of *dtype*."""
    for mapping, auto in _AUTO:
        if type(config) in mapping:
            with making_a_model(config), torch.device("meta"):
                return auto.from_config(copy.deepcopy(config), dtype=getattr(torch, dtype))
    raise ValueError(
        f"{type(config).__name__} is of no language model, whose steps can be estimated; known are the models of "
        f"{', '.join(auto.__name__ for _, auto in _AUTO)}"
    )


@attrs.frozen(eq=False, slots=False)
class SearchedModel:
    """A model on the meta device: ``whole``, and ``slim``, its first layers with at least one block of every kind."""

    config: Any
    dtype: str = "float32"

    @cached_property
    def whole(self) -> Any:
        """The model with all layers."""
        return on_meta(self.config, self.dtype)

    @cached_property
    def parameters(self) -> Mapping[str, tuple[tuple[int, ...], int]]:
        """The shape and the bytes per number of every parameter, by name, each once."""
        return {name: (tuple(p.shape), p.element_size()) for name, p in self.whole.named_parameters()}

    @cached_property
    def kinds(self) -> Mapping[str, Kind]:
        """The kind of every block, by name."""
        return kinds(self.whole)

    @cached_property
    def slim(self) -> Any:
        """The model with few layers; the whole one where its config cannot be shortened so that it keeps its kinds."""
        wanted = self.kinds
        layers = getattr(self.config.get_text_config(), _LAYERS, None)
        if not isinstance(layers, int):
            return self.whole
        for count in range(1, min(layers, 64)):
            found = on_meta(_shortened(self.config, count), self.dtype)
            own = kinds(found)
            if all(wanted.get(name) == kind for name, kind in own.items()) and set(own.values()) == set(
                wanted.values()
            ):
                return found
        return self.whole


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
