"""Check whether a model can be computed on parts of a sequence; what is not known to be exact is refused."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from nemo_dist.hf_model import NEXT_TOKEN_LOSSES, has_towers, loss_type, towers

_PER_TOKEN = ("ForTokenClassification", "ForMaskedLM")
_LAYERS = {"full_attention", "sliding_attention"}
_ROPES_BY_LENGTH = {"dynamic", "longrope"}


def require_splittable(model: Any, method: str, ranks: int, tensor_ranks: int) -> None:
    """Raise ValueError with every reason why *model* cannot be split over *ranks* along the sequence."""
    reasons = [*_structure(model), *_loss(model)]
    if method == "ulysses":
        reasons += _heads(model.config.get_text_config(), ranks, tensor_ranks)
    if reasons:
        raise ValueError(
            f"cp_size={ranks} does not fit {type(model).__name__}:\n" + "\n".join(f"- {reason}" for reason in reasons)
        )


def is_causal(model: Any) -> bool:
    """Whether tokens attend only to earlier ones."""
    causal = [bool(module.is_causal) for module in model.modules() if hasattr(module, "is_causal")]
    return bool(causal) and all(causal) and getattr(model.config, "is_causal", True) is not False


def counts_positions(model: nn.Module) -> bool:
    """Whether *model* numbers tokens 0, 1, 2, ... where a batch has no positions; known only of rotary models."""
    return any(name.endswith("inv_freq") for name, _ in model.named_buffers())


def _structure(model: Any) -> Iterator[str]:
    config = model.config
    text = config.get_text_config()
    if config.is_encoder_decoder:
        yield "it has an encoder and a decoder, whose sequences differ; use cp_size=1"
    if has_towers(model):
        names = ", ".join(towers(model))
        yield f"it has several towers ({names}), and images or sounds cannot be split with the tokens; use cp_size=1"
    if config._attn_implementation != "sdpa":
        yield (
            f"its attention implementation is {config._attn_implementation!r}, and only 'sdpa' is exact on parts of a "
            "sequence; load it with attn_implementation='sdpa'"
        )
    if not getattr(model, "_supports_context_parallel", True):
        yield "transformers says that its attention cannot be split (attention sinks, say); use cp_size=1"
    if strange := sorted(set(getattr(text, "layer_types", None) or ()) - _LAYERS):
        yield f"it has layers of type {', '.join(strange)}, which carry a state along the sequence; use cp_size=1"
    if not any(isinstance(module, GradientCheckpointingLayer) for module in model.modules()):
        yield "transformers does not say which of its modules are blocks; use cp_size=1"
    if mixing := sorted(set(_mixing(model))):
        yield f"its blocks mix tokens outside of attention ({', '.join(mixing)}); use cp_size=1"
    if "position_ids" not in inspect.signature(model.forward).parameters or getattr(text, "alibi", False):
        yield "it takes no position_ids, so a part of a sequence would be numbered from 0; use cp_size=1"
    if ropes := sorted(_ropes(text) & _ROPES_BY_LENGTH):
        yield f"its rotary embedding ({', '.join(ropes)}) depends on the length that a rank sees; use cp_size=1"


def _mixing(model: Any) -> Iterator[str]:
    """Yield the classes of modules, in blocks, that mix tokens of a sequence other than by attention."""
    for block in (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)):
        if not any(hasattr(module, "is_causal") for module in block.modules()):
            yield type(block).__name__
        yield from {type(m).__name__ for m in block.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.RNNBase)}


def _ropes(config: Any) -> set[str]:
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return {str(kind["rope_type"]) for kind in kinds if "rope_type" in kind}


def _loss(model: Any) -> Iterator[str]:
    kind = loss_type(model)
    if kind not in (*NEXT_TOKEN_LOSSES, *_PER_TOKEN):
        known = ", ".join((*NEXT_TOKEN_LOSSES, *_PER_TOKEN))
        yield f"its loss ({kind}) is not a mean over tokens, which all ranks could share; known: {known}"


def _heads(config: Any, ranks: int, tensor_ranks: int) -> Iterator[str]:
    queries = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or queries
    each = f" on each of {tensor_ranks} tensor-parallel ranks" if tensor_ranks > 1 else ""
    queries, keys = queries // tensor_ranks, max(1, keys // tensor_ranks)
    share = "'ulysses' gives every rank a share of the heads"
    if queries % ranks:
        yield f"{share}, and {queries} query heads{each} do not divide by {ranks}; use method='all_gather'"
    if keys % ranks and ranks % keys:
        yield (
            f"{share}, and {keys} key heads{each} neither divide by {ranks} nor divide {ranks}; use method='all_gather'"
        )
