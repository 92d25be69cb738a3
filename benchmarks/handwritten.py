"""What a careful person writes for one Llama and one strategy, without nemo_dist."""

from __future__ import annotations

from typing import Any

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
