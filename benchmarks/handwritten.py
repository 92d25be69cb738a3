"""What a careful person writes for one Llama and one strategy, without nemo_dist."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from steps import VOCABULARY, Batch
from torch import Tensor
from torch.distributed._functional_collectives import all_gather_tensor_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM

_SEQUENCE = Shard(1)  # activations are (rows, tokens, features)


def llama() -> LlamaConfig:
    """Return the config of the Llama that is trained: 256 wide, 6 layers."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        use_cache=False,
    )


def shard(model: LlamaForCausalLM, mesh: DeviceMesh, **options: Any) -> LlamaForCausalLM:
    """Shard *model* in place over *mesh*: a group per layer, one for the embedding, one for norm and head together."""
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model.model.embed_tokens, mesh=mesh, **options)
    fully_shard([model.model.norm, model.lm_head], mesh=mesh, reshard_after_forward=False, **options)
    fully_shard(model, mesh=mesh, reshard_after_forward=False, **options)
    return model


# ---- tensor parallelism, as in torch's tutorial and torchtitan ----


def cut(model: LlamaForCausalLM, mesh: DeviceMesh, sequence: bool) -> LlamaForCausalLM:
    """Cut *model* in place over *mesh*; with *sequence*, the tokens between attention and feed-forward too."""
    outside = _SEQUENCE if sequence else Replicate()
    layer = {
        **{f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"},
        "self_attn.o_proj": RowwiseParallel(output_layouts=outside),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(output_layouts=outside),
    }
    if sequence:
        layer |= {
            "input_layernorm": SequenceParallel(),
            "post_attention_layernorm": SequenceParallel(),
            "self_attn": PrepareModuleInput(
                input_kwarg_layouts={"hidden_states": _SEQUENCE},
                desired_input_kwarg_layouts={"hidden_states": Replicate()},
            ),
            "mlp": PrepareModuleInput(input_layouts=(_SEQUENCE,), desired_input_layouts=(Replicate(),)),
        }
    for block in model.model.layers:
        parallelize_module(block, mesh, layer)
    ends = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=outside),
        "lm_head": ColwiseParallel(input_layouts=outside, output_layouts=Shard(-1), use_local_output=False),
    }
    parallelize_module(model, mesh, ends | ({"model.norm": SequenceParallel()} if sequence else {}))
    return model


def next_token_loss(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Return the mean loss of *batch*; its logits lie cut along the vocabulary, so call it in ``loss_parallel()``."""
    tokens = batch["input_ids"]
    logits = model(input_ids=tokens, position_ids=torch.arange(tokens.shape[1]).unsqueeze(0)).logits
    return _cross_entropy(logits, F.pad(batch["labels"], (0, 1), value=-100)[:, 1:])


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


# ---- context parallelism: keys and values gathered, a chunk of the head and one of the tail on every rank ----


def own_part(batch: Batch, rank: int, ranks: int) -> Batch:
    """Return this rank's tokens of *batch*, with labels shifted before the cut, and their positions."""
    tokens, labels = batch["input_ids"], F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    mine = torch.cat([torch.arange(tokens.shape[1]).chunk(2 * ranks)[place] for place in (rank, 2 * ranks - 1 - rank)])
    return {"input_ids": tokens[:, mine], "shift_labels": labels[:, mine], "position_ids": mine.unsqueeze(0)}


def part_loss(model: LlamaForCausalLM, part: Batch) -> Tensor:
    """Return the mean loss of a rank's *part* of a batch."""
    logits = model(input_ids=part["input_ids"], position_ids=part["position_ids"]).logits
    return _cross_entropy(logits, part["shift_labels"])


def share_attention(model: LlamaForCausalLM, mesh: DeviceMesh) -> LlamaForCausalLM:
    """Let the attention of *model* see the tokens of all ranks of *mesh*."""
    group, ranks, rank = mesh.get_group(), mesh.size(), mesh.get_local_rank()
    order = [place for r in range(ranks) for place in (r, 2 * ranks - 1 - r)]
    masks: dict[tuple[int, int], Tensor] = {}

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        pair = torch.cat((key, value), dim=-1).movedim(2, 0).contiguous()
        chunks = all_gather_tensor_autograd(pair, 0, group).chunk(2 * ranks)
        whole = torch.cat([chunks[order.index(place)] for place in range(2 * ranks)]).movedim(0, 2)
        keys, values = whole.split(key.shape[-1], dim=-1)
        step = query.shape[2] // 2
        found = []
        for part, place in zip(query.chunk(2, dim=2), (rank, 2 * ranks - 1 - rank), strict=True):
            stop = (place + 1) * step
            allowed = masks.setdefault((step, stop), torch.ones(step, stop, dtype=torch.bool).tril(stop - step))
            found.append(
                F.scaled_dot_product_attention(
                    part, keys[:, :, :stop], values[:, :, :stop], attn_mask=allowed, scale=scaling, enable_gqa=True
                )
            )
        return torch.cat(found, dim=2).transpose(1, 2).contiguous(), None

    AttentionInterface.register("by_hand", attend)
    AttentionMaskInterface.register("by_hand", lambda *_, **__: None)
    model.set_attn_implementation("by_hand")
    return model
