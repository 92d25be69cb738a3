"""Prepare a model for batches that are split along the sequence: its attention, its forward and its loss."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from nemo_dist import RuntimePart
from nemo_dist.hf_model import accepts, attention_of, class_name, predicts_next_token
from nemo_dist.plugin.memory_estimate import once_per_model
from nemo_dist.training.router_aux_loss import COUNTED
from nemo_dist_context.attention import SharedAttention
from nemo_dist_context.batch import SEQUENCES, split_tokens
from nemo_dist_context.collectives import joined
from nemo_dist_context.model_check import require_splittable
from nemo_dist_context.proof import Proof, splitter_of
from nemo_dist_context.sequence_layout import SequenceLayout

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nemo_dist import MeshContext
    from nemo_dist_context.config import ContextConfig


_proofs: WeakKeyDictionary[Any, Proof] = WeakKeyDictionary()  # of the parts of loaded models


def apply_context_parallelism(parts: Sequence[Any], mesh: MeshContext, config: ContextConfig) -> None:
    """Make *parts* compute a split batch as one process computes the whole one; other batches run as before.

    Raises ValueError with every reason why the model cannot be split.
    """
    group = mesh.group("cp")
    if group is None:
        return
    proof = require_splittable(parts[0], _prepare, config.method, mesh.size("cp"), mesh.size("tp"))
    for part in parts:
        _proofs[part] = proof
        layout = layout_of(proof, mesh, config)
        _prepare(part, SharedAttention(layout=layout, group=group, method=config.method, base=attention_of(part)))


@once_per_model
def require_fit(model: Any, method: str, ranks: int, tensor_ranks: int) -> Proof:
    """Raise ValueError with every reason why *model* cannot be split over *ranks*; nothing is changed."""
    return require_splittable(model, _prepare, method, ranks, tensor_ranks)


def runtime_part(part: Any, mesh: MeshContext, config: ContextConfig) -> RuntimePart:
    """Return what a step of the model that *part* belongs to needs: its batches, and what a loss reads, are split."""
    proof = _proofs[part]
    group: Any = mesh.group("cp")  # there is one, as cp is wider than 1
    layout = layout_of(proof, mesh, config)

    def join(tokens: Tensor, length: int) -> Tensor:
        return joined(tokens, length, layout, group)

    return RuntimePart(
        batch=splitter_of(part, layout, proof.numbering, proof.causal),
        split_tokens=partial(split_tokens, layout),
        join_tokens=join,
        needs_loss=f"cp_size={layout.size} does not fit {class_name(part)}: {proof.loss}" if proof.loss else "",
    )


def layout_of(proof: Proof, mesh: MeshContext, config: ContextConfig) -> SequenceLayout:
    """Return how the cp ranks share a sequence: balanced where attention is causal, unless the user said otherwise."""
    balanced = proof.causal if config.balance is None else config.balance
    return SequenceLayout(size=mesh.size("cp"), rank=mesh.rank("cp"), balanced=balanced)


def _prepare(part: Any, attention: SharedAttention) -> None:
    """Let *part* compute split batches with *attention*."""
    part.set_attn_implementation(attention.register())
    part.register_forward_pre_hook(partial(_begin, attention), with_kwargs=True)
    part.register_forward_hook(partial(_end, attention), with_kwargs=True, always_call=True)
    if predicts_next_token(part):
        part.loss_function = partial(_next_token_loss, part.loss_function, attention)


def _begin(attention: SharedAttention, part: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Take the sequence ids of a split batch out of the arguments; pass a mask of the whole sequence in their place."""
    ids = kwargs.pop(SEQUENCES, None)
    kwargs.pop(COUNTED, None)
    attention.sequences = ids
    attention.shifted = False
    if ids is not None:
        kwargs["attention_mask"] = ids > 0
        if not accepts(part, "position_ids"):
            del kwargs["position_ids"]
    return args, kwargs


def _end(attention: SharedAttention, part: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    """End a split batch; raise ValueError when its loss was computed from labels that were not shifted before."""
    split, attention.sequences = attention.sequences is not None, None
    unshifted = predicts_next_token(part) and not attention.shifted
    if split and unshifted and kwargs.get("labels") is not None and getattr(output, "loss", None) is not None:
        raise ValueError(
            f"{type(part).__name__} computes its loss without shift_labels, so labels cannot be split with the "
            "sequence; leave them out and compute the loss from the logits"
        )


def _next_token_loss(original: Any, attention: SharedAttention, *args: Any, **kwargs: Any) -> Any:
    """Run the model's loss function, and record whether it was given labels that were shifted before the split."""
    attention.shifted = kwargs.get("shift_labels") is not None
    return original(*args, **kwargs)
