"""Refuse a model that parts of sequences are not exact for, before its weights are read."""

import torch

from nemo_dist.hf_model import attention_of, class_name, has_towers, predicts_next_token
from nemo_dist.training.rehearsal import Rehearsal, mixes_packed_sequences, same


def require_splittable(model, ranks):
    """Raise ValueError with every reason why *model* cannot be split over *ranks*."""
    reasons = list(plain_reasons(model, ranks)) or list(tried_reasons(model))
    if reasons:
        lines = "\n".join(f"- {reason}" for reason in reasons)
        raise ValueError(f"ulysses cannot split {class_name(model)} over cp_size={ranks}:\n{lines}\nuse cp_size=1")


def plain_reasons(model, ranks):
    """Yield what its config says."""
    config = model.config.get_text_config()
    if not predicts_next_token(model) or has_towers(model):
        yield "it is no decoder of text alone"
    if attention_of(model) != "sdpa":
        yield f"its attention is {attention_of(model)!r}; load it with attn_implementation='sdpa'"
    if hasattr(config, "router_aux_loss_coef"):
        yield "its routers count tokens; the plugin 'context' can split it"
    kinds = getattr(config, "rope_parameters", None) or {}
    if "dynamic" in str(kinds) or "longrope" in str(kinds):
        yield "its rotary embedding depends on the length that a rank sees"
    heads = config.num_attention_heads
    for what, number in (("query", heads), ("key", getattr(config, "num_key_value_heads", None) or heads)):
        if number % ranks:
            yield f"{number} {what} heads cannot be shared by {ranks} ranks; the plugin 'context' can split it"


def tried_reasons(model):
    """Run a copy without weights on a few tokens, and yield what it does with them besides attention."""
    if found := mixes_packed_sequences(model):
        yield f"tokens depend on each other outside of attention, in {found}"
        return
    tokens, places = torch.arange(1, 7)[None], torch.arange(6)[None]
    copy = Rehearsal.of(model)
    plain, placed = copy.run({"input_ids": tokens}), copy.run({"input_ids": tokens, "position_ids": places})
    if not same(plain.output.logits, placed.output.logits):
        yield "it numbers tokens in a way of its own; the plugin 'context' may split it"
