"""Tiny models of real transformers classes, and batches for them, each made from a name and a seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import torch
import transformers
from torch import Tensor

import nemo_dist
from nemo_dist.hf_model import blocks, input_embedding

_IGNORED = -100
_VOCABULARY = 96
_PATCHES = 4  # image tokens per image in the vision-language model


@attrs.frozen(kw_only=True)
class Specimen:
    """A tiny model: how to make its config, the name of its loader class, and how to make a batch for it.

    ``batch(rows, length, generator)`` returns tensors with *rows* rows; labels per token are masked differently in
    every row. ``edit`` changes the initial weights.
    """

    name: str
    loader: str
    config: Callable[[], Any]
    batch: Callable[[int, int, torch.Generator], dict[str, Tensor]]
    edit: Callable[[Any], None] = lambda model: None

    @property
    def load(self) -> Any:
        """The ``NeMoAutoModelFor*`` class that loads it."""
        return getattr(nemo_dist, self.loader)

    def make(self, seed: int = 0) -> Any:
        """Return the unsharded model with seeded float32 weights, with noise on 1-D parameters (biases, norms)."""
        torch.manual_seed(seed)
        model = self.load.from_config(self.config(), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
            self.edit(model)
        return model


def _text(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": _VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "initializer_range": 0.1,
        **more,
    }


def _llama(**more: Any) -> Callable[[], Any]:
    return lambda: transformers.LlamaConfig(**_text(**more))


def _qwen3(**more: Any) -> Callable[[], Any]:
    return lambda: transformers.Qwen3Config(**_text(head_dim=8, **more))


def _odd(**more: Any) -> Any:
    """Return a config with sizes that few numbers divide: vocabulary, width, 6 query and 3 key heads; with biases."""
    odd = {"vocab_size": 101, "hidden_size": 36, "intermediate_size": 57, "attention_bias": True, "mlp_bias": True}
    return transformers.LlamaConfig(**_text(**odd, num_attention_heads=6, num_key_value_heads=3, head_dim=6, **more))


def _phi3(**more: Any) -> Callable[[], Any]:
    return lambda: transformers.Phi3Config(**_text(bos_token_id=1, eos_token_id=2, **more))


def _gemma3() -> Any:
    """Return a config with a scaled embedding, q/k norms, post-norms, sliding windows and tied embeddings."""
    return transformers.Gemma3TextConfig(**_text(head_dim=8, sliding_window=8, layer_types=_gemma3_layers()))


def _gemma3_layers() -> list[str]:
    return ["sliding_attention", "full_attention", "sliding_attention"]


def _gemma2() -> Any:
    return transformers.Gemma2Config(**_text(head_dim=8, sliding_window=8, final_logit_softcapping=5.0))


def _olmo2() -> Any:
    return transformers.Olmo2Config(**_text())


def _neox() -> Any:
    text = _text()
    text.pop("num_key_value_heads")
    return transformers.GPTNeoXConfig(**text)


def _gpt2() -> Any:
    """Return a config with learned positions, tied embeddings, and a class whose name says no type of loss."""
    return transformers.GPT2Config(
        vocab_size=_VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=128, initializer_range=0.1
    )


def _granite() -> Any:
    """Return a config that scales the embedding, the residuals and the logits."""
    scales = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0}
    return transformers.GraniteConfig(**_text(**scales))


def _lfm2() -> Any:
    """Return a config of a hybrid: convolutions over the sequence, and attention."""
    return transformers.Lfm2Config(**_text(layer_types=["conv", "full_attention", "conv"]))


def _moe(**more: Any) -> dict[str, Any]:
    sizes = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
    return _text(**{**sizes, "output_router_logits": True, "router_aux_loss_coef": 0.1, **more})


def _qwen3_moe(**more: Any) -> Callable[[], Any]:
    return lambda: transformers.Qwen3MoeConfig(**_moe(**more))


def _tie_routers(model: Any) -> None:
    """Make all experts equally likely, so that every token is routed to the experts that win ties."""
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            parameter.copy_(parameter[:1].expand_as(parameter))


def _mixtral() -> Any:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
    return transformers.MixtralConfig(**_text(router_aux_loss_coef=0.1, sliding_window=None, **experts))


def _qwen2_moe() -> Any:
    return transformers.Qwen2MoeConfig(**_moe(shared_expert_intermediate_size=40))


def _deepseek_v3(layers: int = 3) -> Any:
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 2, "topk_group": 1, "n_shared_experts": 1}
    return transformers.DeepseekV3Config(
        **_text(
            num_hidden_layers=layers,
            num_key_value_heads=4,
            moe_intermediate_size=24,
            first_k_dense_replace=1,
            **latent,
            **experts,
        )
    )


def _deepseek() -> Any:
    latent = {"kv_lora_rank": 16, "q_lora_rank": None, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 1}
    return transformers.DeepseekV2Config(**_text(num_key_value_heads=4, first_k_dense_replace=1, **latent, **experts))


def _glm4_moe() -> Any:
    """Return a config with an option that is off by default and that its tensor-parallel plan forgets: q/k norms."""
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1}
    options = {"use_qk_norm": True, "attention_bias": True, "head_dim": 8, "topk_group": 1, "first_k_dense_replace": 1}
    return transformers.Glm4MoeConfig(**_text(**experts, **options))


def _apertus() -> Any:
    """Return a config whose activation has parameters of its own, which act between two cut projections."""
    return transformers.ApertusConfig(**_text())


def _inkling2() -> Any:
    """Return a config whose plan calls the packed projections of its experts plain column-wise."""
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
    return transformers.CONFIG_MAPPING["inkling2_text"](**_text(num_hidden_layers=2, **experts))


def _gptj() -> Any:
    """Return a config without a plan whose attention counts its heads itself."""
    quiet: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes: dict[str, Any] = {
        "vocab_size": _VOCABULARY,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "rotary_dim": 8,
    }
    return transformers.GPTJConfig(**sizes, **quiet, bos_token_id=1, eos_token_id=2)


def _opt() -> Any:
    """Return a config without a plan whose blocks hold their feed-forward layers themselves."""
    text = _text(dropout=0.0, attention_dropout=0.0, ffn_dim=56, word_embed_proj_dim=32)
    return transformers.OPTConfig(**{name: value for name, value in text.items() if name != "intermediate_size"})


def _bloom() -> Any:
    """Return a config without a plan, with packed projections and a slope for every head."""
    quiet: dict[str, Any] = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.BloomConfig(vocab_size=_VOCABULARY, hidden_size=32, n_layer=2, n_head=4, **quiet)


def _mistral(**more: Any) -> Callable[[], Any]:
    return lambda: transformers.MistralConfig(**_text(sliding_window=5, **more))


def _bert() -> Any:
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
    return transformers.BertConfig(**_text(num_labels=3, **options))


def _gpt_oss() -> Any:
    """Return a config without a plan, with a sink for every head, sliding windows, and biases for every expert."""
    layers = ["sliding_attention", "full_attention"]
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return transformers.GptOssConfig(
        **_text(head_dim=8, num_hidden_layers=2, sliding_window=5, layer_types=layers, **experts)
    )


def _llama4(**more: Any) -> Any:
    """Return a config with chunked attention, layers without rotary embedding, and experts."""
    layers = ["chunked_attention", "full_attention"]
    experts = {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 56, "no_rope_layers": [1, 0]}
    return transformers.Llama4TextConfig(
        **_text(head_dim=8, num_hidden_layers=2, attention_chunk_size=5, layer_types=layers, **experts, **more)
    )


def _roberta_decoder() -> Any:
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "is_decoder": True}
    return transformers.RobertaConfig(**_text(bos_token_id=1, eos_token_id=2, **options))


def _mamba() -> Any:
    return transformers.MambaConfig(
        vocab_size=_VOCABULARY, hidden_size=32, state_size=8, time_step_rank=4, num_hidden_layers=2, pad_token_id=0
    )


def _llava() -> Any:
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4
    )
    return transformers.LlavaConfig(
        vision_config=vision, text_config=_llama()(), image_token_index=_VOCABULARY - 1, image_seq_length=_PATCHES
    )


def _tokens(rows: int, length: int, generator: torch.Generator) -> Tensor:
    return torch.randint(1, _VOCABULARY - 1, (rows, length), generator=generator)


def _uneven(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Mask a different share of the labels in every row, all of them in the first, so a rank may have no labels."""
    shares = torch.linspace(1.0, 0.1, len(labels)).unsqueeze(1)
    return torch.where(torch.rand(labels.shape, generator=generator) < shares, _IGNORED, labels)


def _causal(rows: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    tokens = _tokens(rows, length, generator)
    return {"input_ids": tokens, "labels": _uneven(tokens, generator)}


def _padded(rows: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    lengths = torch.linspace(length, length // 2, rows).long().unsqueeze(1)
    mask = (torch.arange(length) < lengths).long()
    return {"input_ids": _tokens(rows, length, generator) * mask, "attention_mask": mask}


def _sequences(rows: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {**_padded(rows, length, generator), "labels": torch.randint(0, 3, (rows,), generator=generator)}


def _tagged(rows: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    batch = _padded(rows, length, generator)
    tags = torch.randint(0, 3, (rows, length), generator=generator)
    return {**batch, "labels": _uneven(torch.where(batch["attention_mask"] == 1, tags, _IGNORED), generator)}


def _padded_causal(rows: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    batch = _padded(rows, length, generator)
    tokens = torch.where(batch["attention_mask"] == 1, batch["input_ids"], _IGNORED)
    return {**batch, "labels": _uneven(tokens, generator)}


def _left_padded(rows: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {name: value.flip(1) for name, value in _padded_causal(rows, length, generator).items()}


def _packed(rows: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Pack several sequences into every row, at different places: positions restart, and there is no mask.

    transformers keeps them apart only where the forward makes no cache, so their configs say ``use_cache=False``.
    """
    batch = _causal(rows, length, generator)
    cuts = torch.rand((rows, length), generator=generator) < 2.5 / length
    cuts[:, 0] = True
    places = torch.arange(length).expand(rows, length)
    starts = torch.where(cuts, places, 0).cummax(dim=1).values
    labels = torch.where(cuts, _IGNORED, batch["labels"])  # the last token of a sequence has no next one
    return {**batch, "labels": labels, "position_ids": places - starts}


def _numbered(rows: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {**_tagged(rows, length, generator), "position_ids": torch.arange(length).expand(rows, length).clone()}


def _images(rows: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    batch = _causal(rows, length, generator)
    batch["input_ids"][:, :_PATCHES] = _VOCABULARY - 1
    batch["labels"][:, :_PATCHES] = _IGNORED
    return {**batch, "pixel_values": torch.randn(rows, 3, 8, 8, generator=generator)}


_CAUSAL = "NeMoAutoModelForCausalLM"

SPECIMENS: dict[str, Specimen] = {
    specimen.name: specimen
    for specimen in (
        Specimen(name="llama", loader=_CAUSAL, config=_llama(), batch=_causal),
        Specimen(name="llama-tied", loader=_CAUSAL, config=_llama(tie_word_embeddings=True), batch=_causal),
        # Enough heads for 8 tensor-parallel ranks: with 8 key heads, with fewer, and with q/k norms.
        Specimen(
            name="llama-heads",
            loader=_CAUSAL,
            config=_llama(hidden_size=64, num_attention_heads=16, num_key_value_heads=8),
            batch=_causal,
        ),
        Specimen(
            name="llama-heads-tied",
            loader=_CAUSAL,
            config=_llama(num_attention_heads=8, tie_word_embeddings=True),
            batch=_causal,
        ),
        Specimen(
            name="qwen3-heads",
            loader=_CAUSAL,
            config=_qwen3(num_attention_heads=8, num_key_value_heads=4),
            batch=_causal,
        ),
        # Enough layers for 4 pipeline ranks with 2 stages each, and a number that does not divide.
        Specimen(name="llama-deep", loader=_CAUSAL, config=_llama(num_hidden_layers=9), batch=_causal),
        Specimen(
            name="llama-deep-tied",
            loader=_CAUSAL,
            config=_llama(num_hidden_layers=9, tie_word_embeddings=True),
            batch=_causal,
        ),
        Specimen(name="qwen3-deep", loader=_CAUSAL, config=_qwen3(num_hidden_layers=9), batch=_causal),
        Specimen(
            name="llama-sequences",
            loader="NeMoAutoModelForSequenceClassification",
            config=_llama(num_hidden_layers=9, num_labels=3),
            batch=_sequences,
        ),
        Specimen(
            name="llama-tokens",
            loader="NeMoAutoModelForTokenClassification",
            config=_llama(num_hidden_layers=9, num_labels=3, classifier_dropout=0.0),
            batch=_tagged,
        ),
        Specimen(name="llama-padded", loader=_CAUSAL, config=_llama(), batch=_padded_causal),
        Specimen(name="llama-left-padded", loader=_CAUSAL, config=_llama(), batch=_left_padded),
        Specimen(name="llama-packed", loader=_CAUSAL, config=_llama(use_cache=False), batch=_packed),
        Specimen(name="mistral", loader=_CAUSAL, config=_mistral(), batch=_causal),
        Specimen(name="mistral-packed", loader=_CAUSAL, config=_mistral(use_cache=False), batch=_packed),
        Specimen(name="qwen3", loader=_CAUSAL, config=_qwen3(), batch=_causal),
        Specimen(name="llama-odd", loader=_CAUSAL, config=_odd, batch=_causal),
        Specimen(name="llama-odd-tied", loader=_CAUSAL, config=lambda: _odd(tie_word_embeddings=True), batch=_causal),
        Specimen(name="phi3", loader=_CAUSAL, config=_phi3(), batch=_causal),
        Specimen(
            name="phi3-deep-tied",
            loader=_CAUSAL,
            config=_phi3(num_hidden_layers=5, tie_word_embeddings=True),
            batch=_causal,
        ),
        Specimen(name="gemma2", loader=_CAUSAL, config=_gemma2, batch=_causal),
        Specimen(name="gemma3", loader=_CAUSAL, config=_gemma3, batch=_causal),
        Specimen(name="gpt2", loader=_CAUSAL, config=_gpt2, batch=_padded_causal),
        Specimen(name="granite", loader=_CAUSAL, config=_granite, batch=_causal),
        Specimen(name="lfm2", loader=_CAUSAL, config=_lfm2, batch=_padded_causal),
        Specimen(name="olmo2", loader=_CAUSAL, config=_olmo2, batch=_causal),
        Specimen(name="neox", loader=_CAUSAL, config=_neox, batch=_causal),
        Specimen(name="gpt-oss", loader=_CAUSAL, config=_gpt_oss, batch=_padded_causal),
        Specimen(name="llama4", loader=_CAUSAL, config=_llama4, batch=_causal),
        Specimen(name="llama4-packed", loader=_CAUSAL, config=lambda: _llama4(use_cache=False), batch=_packed),
        Specimen(name="gemma2-left-padded", loader=_CAUSAL, config=_gemma2, batch=_left_padded),
        Specimen(name="opt", loader=_CAUSAL, config=_opt, batch=_left_padded),
        Specimen(name="roberta-decoder", loader=_CAUSAL, config=_roberta_decoder, batch=_left_padded),
        Specimen(name="mamba", loader=_CAUSAL, config=_mamba, batch=_causal),
        Specimen(name="deepseek", loader=_CAUSAL, config=_deepseek, batch=_causal),
        Specimen(
            name="bert-sequences", loader="NeMoAutoModelForSequenceClassification", config=_bert, batch=_sequences
        ),
        Specimen(name="bert-tokens", loader="NeMoAutoModelForTokenClassification", config=_bert, batch=_tagged),
        Specimen(name="bert-numbered", loader="NeMoAutoModelForTokenClassification", config=_bert, batch=_numbered),
        Specimen(name="qwen3-moe", loader=_CAUSAL, config=_qwen3_moe(), batch=_causal),
        Specimen(name="qwen3-moe-padded", loader=_CAUSAL, config=_qwen3_moe(), batch=_padded_causal),
        Specimen(name="qwen3-moe-deep", loader=_CAUSAL, config=_qwen3_moe(num_hidden_layers=4), batch=_causal),
        Specimen(name="qwen3-moe-six", loader=_CAUSAL, config=_qwen3_moe(num_experts=6), batch=_causal),
        Specimen(name="qwen3-moe-tied", loader=_CAUSAL, config=_qwen3_moe(), batch=_causal, edit=_tie_routers),
        Specimen(name="mixtral", loader=_CAUSAL, config=_mixtral, batch=_causal),
        Specimen(name="qwen2-moe", loader=_CAUSAL, config=_qwen2_moe, batch=_causal),
        Specimen(name="deepseek-v3", loader=_CAUSAL, config=_deepseek_v3, batch=_causal),
        Specimen(name="deepseek-v3-deep", loader=_CAUSAL, config=lambda: _deepseek_v3(layers=4), batch=_causal),
        Specimen(name="glm4-moe-norms", loader=_CAUSAL, config=_glm4_moe, batch=_causal),
        Specimen(name="apertus", loader=_CAUSAL, config=_apertus, batch=_causal),
        Specimen(name="inkling2", loader=_CAUSAL, config=_inkling2, batch=_causal),
        Specimen(name="gptj", loader=_CAUSAL, config=_gptj, batch=_causal),
        Specimen(name="bloom", loader=_CAUSAL, config=_bloom, batch=_causal),
        Specimen(name="llava", loader="NeMoAutoModelForImageTextToText", config=_llava, batch=_images),
    )
}


def first_modules(specimen: str) -> tuple[str, ...]:
    """Return the prefixes of the parameters in the first repeated block and in the input embedding of *specimen*."""
    model = SPECIMENS[specimen].make()
    embedding = input_embedding(model)
    kinds = [type(block) for block in blocks(model).values()]
    found = [name for name, block in blocks(model).items() if kinds.count(type(block)) > 1][:1]
    found += [name for name, module in model.named_modules() if module is embedding]
    names = [name for name, _ in model.named_parameters()]
    return tuple(f"{prefix}." for prefix in found if any(name.startswith(f"{prefix}.") for name in names))


def tied_twin(specimen: str) -> str | None:
    """Return *specimen*, if its output head is tied to the embedding, or else the name of it with such a head."""
    model = SPECIMENS[specimen].make()
    head, embedding = model.get_output_embeddings(), input_embedding(model)
    if head is not None and embedding is not None and head.weight is embedding.weight:
        return specimen
    return _TIED.get(specimen)


_TIED = {
    "llama": "llama-tied",
    "llama-heads": "llama-heads-tied",
    "llama-deep": "llama-deep-tied",
    "phi3": "phi3-deep-tied",
}
