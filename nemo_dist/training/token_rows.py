"""Compute PEFT's trainable rows of an embedding (``trainable_token_indices``) beside it, without reading its weight.

PEFT puts the rows into a copy of the weight and looks the tokens up in that. A weight that is sharded is whole only
while its own module runs, so here the module runs, and the trained rows take the place of what it found for their
tokens. In a head that is tied to the embedding the rows give the logits of their tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nemo_dist.plugin.forwards import wrap_forward


def compute_beside(made: nn.Module) -> None:
    """Let the trainable rows in the PEFT model *made* compute beside the modules that they stand for.

    Raises ValueError for a module that is neither an embedding nor a linear layer without a bias.
    """
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    for name, layer in made.named_modules():
        if not isinstance(layer, TrainableTokensLayer):
            continue
        base = layer.get_base_layer()
        if isinstance(base, nn.Embedding) and base.max_norm is None:
            wrap_forward(layer, partial(_forward, layer, _looked_up))
        elif isinstance(base, nn.Linear) and base.bias is None:
            wrap_forward(layer, partial(_forward, layer, _with_logits))
        else:
            raise ValueError(
                f"trainable_token_indices names {name}, a {type(base).__name__} that is neither an embedding without "
                "max_norm nor a linear layer without a bias; leave it out"
            )


def _forward(
    layer: Any,
    change: Callable[[Any, Tensor, Tensor, Tensor, Tensor], Tensor],
    original: Callable[..., Tensor],
    value: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    if layer.disable_adapters or layer.merged or not layer.active_adapters:
        return original(value, *args, **kwargs)
    found: Tensor = layer.get_base_layer()(value)
    for adapter in layer.active_adapters:
        indices = torch.tensor(layer.token_indices[adapter], device=value.device)
        found = change(layer, value, found, indices, layer.trainable_tokens_delta[adapter].to(found.dtype))
    return found


def _looked_up(layer: Any, ids: Tensor, found: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    """Return *found*, with those of *rows* for the ids that are among *indices*; padding gets no gradient."""
    ordered, order = indices.sort()
    place = torch.searchsorted(ordered, ids.contiguous()).clamp(max=len(ordered) - 1)
    mine = functional.embedding(order[place], rows)
    scale = getattr(layer.get_base_layer(), "embed_scale", None)  # the module's forward multiplies by it
    mine = mine if scale is None else mine * torch.as_tensor(scale, device=mine.device).to(mine.dtype)
    padding = layer.get_base_layer().padding_idx
    if padding is not None:
        mine = torch.where((ids == padding).unsqueeze(-1), mine.detach(), mine)
    return torch.where((ordered[place] == ids).unsqueeze(-1), mine, found)


def _with_logits(_: Any, hidden: Tensor, found: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    """Return the logits *found*, with those of *rows* for the tokens *indices*."""
    return found.index_copy(-1, indices, functional.linear(hidden, rows))
