"""What a careful person writes for one Llama and one strategy or pipeline, without nemo_dist."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaForCausalLM


def shard(model: LlamaForCausalLM, mesh: DeviceMesh, **options: Any) -> LlamaForCausalLM:
    """Shard *model* in place over *mesh*: a group per layer, one for the embedding, one for norm and head together."""
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model.model.embed_tokens, mesh=mesh, **options)
    fully_shard([model.model.norm, model.lm_head], mesh=mesh, reshard_after_forward=False, **options)
    fully_shard(model, mesh=mesh, reshard_after_forward=False, **options)
    return model


class LlamaStage(nn.Module):
    """A stage of a Llama: the *layers* of *model*, the embedding before or norm and head after them at the ends."""

    def __init__(self, model: LlamaForCausalLM, layers: Sequence[int], first: bool, last: bool) -> None:
        super().__init__()
        self.embed_tokens = model.model.embed_tokens if first else None
        self.layers = nn.ModuleList(model.model.layers[index] for index in layers)
        self.rotary_emb = model.model.rotary_emb
        self.norm = model.model.norm if last else None
        self.lm_head = model.lm_head if last else None

    def forward(self, hidden: Tensor) -> Tensor:
        """Return hidden states of token ids or hidden states, or the logits at the end."""
        if self.embed_tokens is not None:
            hidden = self.embed_tokens(hidden)
        positions = torch.arange(hidden.shape[1]).unsqueeze(0)
        angles = self.rotary_emb(hidden, positions)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=angles)
        return hidden if self.lm_head is None else self.lm_head(self.norm(hidden))


def shard_stage(stage: LlamaStage, mesh: DeviceMesh, **options: Any) -> LlamaStage:
    """Shard *stage* in place over *mesh*, in the groups of ``shard``; gathered once for all microbatches."""
    options = {"mesh": mesh, "reshard_after_forward": False, **options}
    for layer in stage.layers:
        fully_shard(layer, **options)
    if stage.embed_tokens is not None:
        fully_shard(stage.embed_tokens, **options)
    if stage.lm_head is not None:
        fully_shard([stage.norm, stage.lm_head], **options)
    fully_shard(stage, **options)
    return stage
