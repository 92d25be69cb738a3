"""Check whether a model can be computed on parts of a sequence; what is not proven exact is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from nemo_dist.hf_model import NEXT_TOKEN_LOSSES, attention_of, has_towers, loss_kind, towers
from nemo_dist_context.proof import WAYS_OUT, Proof, Unequal, prove

_PER_TOKEN = ("ForTokenClassification", "ForMaskedLM")
_ROPES_BY_LENGTH = {"dynamic", "longrope"}


def require_splittable(model: Any, prepare: Callable[..., None], method: str, ranks: int, tensor_ranks: int) -> Proof:
    """Return how *model* treats sequences; raise ValueError with every reason why it cannot be split over *ranks*.

    ``prepare(model, attention)`` makes a model compute split batches.
    """
    reasons = list(_structure(model))
    proof: Proof | None = None
    if not reasons:  # a model that is refused need not run
        try:
            proof = prove(model, prepare, attention_of(model), _loss(model))
        except Unequal as error:
            reasons.append(f"{error}; use cp_size=1")
    if proof is not None and method == "ulysses":
        reasons += _heads(model, proof.heads, ranks, tensor_ranks)
    if proof is None or reasons:
        raise ValueError(
            f"cp_size={ranks} does not fit {type(model).__name__}:\n" + "\n".join(f"- {reason}" for reason in reasons)
        )
    return proof


def _structure(model: Any) -> Iterator[str]:
    config = model.config
    if config.is_encoder_decoder:
        yield "it has an encoder and a decoder, whose sequences differ; use cp_size=1"
    if has_towers(model):
        names = ", ".join(towers(model))
        yield f"it has several towers ({names}), and images or sounds cannot be split with the tokens; use cp_size=1"
    if attention_of(model) not in ("sdpa", "eager"):
        yield (
            f"its attention implementation is {attention_of(model)!r}, and only 'sdpa' and 'eager' are exact on parts "
            "of a sequence; load it with attn_implementation='sdpa', or 'eager' where it has no other"
        )
    if ropes := sorted(_ropes(config.get_text_config()) & _ROPES_BY_LENGTH):
        yield f"its rotary embedding ({', '.join(ropes)}) depends on the length that a rank sees; use cp_size=1"


def _ropes(config: Any) -> set[str]:
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return {str(kind["rope_type"]) for kind in kinds if "rope_type" in kind}


def _loss(model: Any) -> str:
    """Return why the model's own loss cannot be computed on parts of a sequence, or an empty string."""
    kind = loss_kind(model)
    if kind in (*NEXT_TOKEN_LOSSES, *_PER_TOKEN):
        return ""
    known = ", ".join((*NEXT_TOKEN_LOSSES, *_PER_TOKEN))
    return f"its loss ({kind}) is not a mean over tokens, which all ranks could share; known: {known}; {WAYS_OUT}"


def _heads(model: Any, heads: frozenset[tuple[int, int]], ranks: int, tensor_ranks: int) -> Iterator[str]:
    """Yield why attentions with these pairs of query and key *heads* cannot be shared by heads."""
    share, each = "'ulysses' gives every rank a share of the heads", ""
    if attention_of(model) == "eager":
        yield "'ulysses' needs 'sdpa', as eager attention may have weights of every head; use method='all_gather'"
    if tensor_ranks > 1:
        each = f" on each of {tensor_ranks} tensor-parallel ranks"
    for queries, keys in sorted(heads):
        queries, keys = queries // tensor_ranks, max(1, keys // tensor_ranks)
        if queries % ranks:
            yield f"{share}, and {queries} query heads{each} do not divide by {ranks}; use method='all_gather'"
        if keys % ranks and ranks % keys:
            yield (
                f"{share}, and {keys} key heads{each} neither divide by {ranks} nor divide {ranks}; use "
                "method='all_gather'"
            )
