"""The router loss is the one of transformers, in every family that has it: value and gradients."""

import pytest
import torch
import transformers

from nemo_dist import MeshContext
from nemo_dist.training.router_aux_loss import RouterLoss

COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8, "mamba_n_groups": 1}
COEFFICIENT = {"router_aux_loss_coef": 0.3}
VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 24, "num_heads": 4, "out_hidden_size": 32}
# What a family needs besides; the names are those in transformers, without ForCausalLM.
FAMILIES = {
    "Dbrx": {  # its router returns the logits alone
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {
            "ffn_hidden_size": 24,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "moe_loss_weight": 0.3,
            "hidden_size": 32,
        },
    },
    "DeepseekV4": {
        "mlp_layer_types": ["moe", "moe"],
        "layer_types": ["sliding_attention", "sliding_attention"],
        "num_key_value_heads": 1,
        "n_routed_experts": 4,
        "q_lora_rank": 16,
        "o_groups": 2,
        "o_lora_rank": 16,
    },
    "Ernie4_5_Moe": {"moe_num_experts": 4, "moe_k": 2},
    "FlexOlmo": {},
    "Flint": {"mlp_only_layers": []},
    "GptOss": {},
    "GraniteMoe": {},
    "GraniteMoeHybrid": {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 24, **MAMBA},
    "GraniteMoeSWA": {},
    "GraniteMoeShared": {},
    "Jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
        "mamba_d_state": 4,
    },
    "JetMoe": {},
    "Laguna": {},
    "Mellum": {},
    "MiniMax": {},
    "MiniMaxM2": {},
    "MiniMaxM3VL": {},
    "Mixtral": {},
    "Olmoe": {},
    "Phimoe": {},
    "Qwen2Moe": {},
    "Qwen3_5Moe": LINEAR,
    "Qwen3Moe": {},
    "Qwen3Next": LINEAR,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
WITH_IMAGES = {"Glm4vMoe": {"rope_parameters": ROPE, "n_routed_experts": 4}, "Qwen3VLMoe": {}, "Qwen3_5Moe": LINEAR}
DEFAULT = {"GptOss", "JetMoe", "Mixtral"}


def batch():
    tokens = torch.randint(3, 90, (3, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[0, 5:] = 0
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


def gradients(model, loss):
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_as_in_transformers(model):
    model = model.float().eval()  # some draw noise in training
    expected = model(**batch(), output_router_logits=True).loss
    expected_gradients = gradients(model, expected)
    plain = model(**batch(), output_router_logits=False).loss.item()

    routers = RouterLoss.of([model], MeshContext())
    with routers.step():
        loss = model(**routers.without(batch())).loss
        balance = routers.settle(1.0)
        found = gradients(model, loss)

    assert expected.item() - plain > 0.1
    assert (loss + balance).item() == pytest.approx(expected.item(), rel=1e-5)
    scale = max(gradient.norm().item() for gradient in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        assert (found[name] - gradient).norm().item() <= 1e-5 * scale, name


@pytest.mark.parametrize(
    "family", [family if family in DEFAULT else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]
)
def test_the_router_loss_of_a_family_is_that_of_transformers(family):
    # JetMoe calls its coefficient otherwise.
    coefficient = {"aux_loss_coef": 0.3} if family == "JetMoe" else COEFFICIENT
    make = getattr(transformers, f"{family}ForCausalLM")
    torch.manual_seed(0)
    assert_as_in_transformers(make(make.config_class(**{**COMMON, **coefficient, **FAMILIES[family]})))


@pytest.mark.slow
@pytest.mark.parametrize("family", WITH_IMAGES)
def test_the_router_loss_beside_images_is_that_of_transformers(family):
    make = getattr(transformers, f"{family}ForConditionalGeneration")
    text = {**COMMON, **COEFFICIENT, **WITH_IMAGES[family]}
    torch.manual_seed(0)
    assert_as_in_transformers(make(make.config_class(text_config=text, vision_config=VISION)))
