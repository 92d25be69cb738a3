"""Count the labels that a model's mean loss is a mean over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nemo_dist.hooks import Batch

IGNORED = -100  # torch's and transformers' mark of a label that does not count
_NEXT_TOKEN = ("ForCausalLM", "ForConditionalGeneration", "CsmForConditionalGeneration")
_PER_LABEL = ("ForMaskedLM", "ForTokenClassification", "ForSequenceClassification")


def count_labels(model: nn.Module, batch: Batch) -> Tensor:
    """Return how many labels of *batch* count in the loss of *model*: a 0-dim float32 tensor on the labels' device.

    Next-token losses leave out the first label of a sequence unless ``shift_labels`` are given; labels of -100 never
    count; float labels (regression, multi-label classification) all do, element by element. This is how
    ``transformers.loss`` averages. Raises ValueError for a batch without labels, or a model whose loss is none of
    these.
    """
    labels: Tensor | None = batch.get("shift_labels", batch.get("labels"))
    if labels is None:
        raise ValueError(f"the batch has no labels (it has {sorted(batch)}); add 'labels', -100 where none counts")
    kind = getattr(model, "loss_type", None)
    if labels.is_floating_point():
        return torch.tensor(float(labels.numel()), device=labels.device)
    if "shift_labels" not in batch and _predicts_next_token(model, kind):
        labels = labels[..., 1:]
    elif "shift_labels" not in batch and kind not in _PER_LABEL:
        known = ", ".join((*_NEXT_TOKEN, *_PER_LABEL))
        raise ValueError(f"{type(model).__name__} has a loss of type {kind!r}, whose mean is not known; known: {known}")
    return (labels != IGNORED).sum().float()


def _predicts_next_token(model: Any, kind: str | None) -> bool:
    return kind in _NEXT_TOKEN and not model.config.is_encoder_decoder
