"""Count the labels that a model's loss is the mean over, and reject a model whose loss is anything else.

Losses are weighted by their label counts, which is silently wrong for a model that adds a term to its loss or takes
another mean. Every model computes its loss in its own forward, so that is judged by the names in the forward's code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from nemo_dist.hf_model import IGNORED, NEXT_TOKEN_LOSSES, class_name, loss_kind, loss_names, predicts_next_token

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nemo_dist.plugin.hookspecs import Batch

_PER_LABEL = ("ForMaskedLM", "ForTokenClassification", "ForSequenceClassification")
_REDUCTIONS = ("num_items_in_batch", "ignore_index")  # what transformers' losses take besides labels
# Names in the code of forwards whose loss is a plain mean over labels. A next-token loss from transformers.loss shifts
# the labels; a forward that calls torch's cross entropy itself mostly does not.
_MEANS = {"loss", "loss_function"}
_CLASSIFIERS = _MEANS | {"loss_fct", "loss_fn", "CrossEntropyLoss", "MSELoss", "BCEWithLogitsLoss"}
_ROUTERS = {"aux_loss", "load_balancing_loss_func", "router_aux_loss_coef", "aux_loss_coef"}
_LOGITS = {"z_loss", "z_loss_coefficient"}  # a mean over all tokens, labels or not


def judge_loss(model: Any, routers_known: bool) -> None:
    """Raise ValueError when the forward of *model* computes a loss that is not known to be a mean over labels.

    ``routers_known``: whether the load balancing loss of its routers, if it adds one, is handled elsewhere.
    """
    kind, names = loss_kind(model), loss_names(model)
    if predicts_next_token(model):
        known = (_MEANS if "loss_function" in names else set()) | (_ROUTERS if routers_known else set())
        if not getattr(model, "z_loss_coefficient", 1):
            known = known | _LOGITS
    elif kind in _PER_LABEL:
        known = _CLASSIFIERS
    else:
        raise ValueError(_unknown(model))
    strange = sorted(names - known) or ([] if names else ["a part of it"])
    if strange:
        way_out = (
            "load it with z_loss_coefficient=0" if strange == sorted(_LOGITS) else "train it in a loop of your own"
        )
        raise ValueError(
            f"{class_name(model)} makes a loss of its own (from {', '.join(strange)}) that is not known to be the mean "
            f"over the labels, so ranks and batches cannot be weighted by theirs; {way_out}"
        )


def count_labels(model: nn.Module, batch: Batch) -> Tensor:
    """Return how many labels of *batch* the loss of *model* averages: a 0-dim float32 tensor on the labels' device.

    Next-token losses leave out the first label of a sequence unless ``shift_labels`` are given; labels of -100 never
    count; float labels (regression, multi-label classification) all do, element by element. This is how
    ``transformers.loss`` averages. Raises ValueError for a batch without labels or with an argument that changes the
    mean, and for a model whose loss is none of these.
    """
    for name in _REDUCTIONS:
        if batch.get(name) is not None:
            raise ValueError(f"the batch has {name!r}, which changes what the loss is a mean over; leave it out")
    labels: Tensor | None = batch.get("shift_labels", batch.get("labels"))
    if labels is None:
        raise ValueError(f"the batch has no labels (it has {sorted(batch)}); add 'labels', -100 where none counts")
    if labels.is_floating_point():
        return torch.tensor(float(labels.numel()), device=labels.device)
    if predicts_next_token(model):
        labels = labels if "shift_labels" in batch else labels[..., 1:]
    elif loss_kind(model) not in _PER_LABEL:
        raise ValueError(_unknown(model))
    return (labels != IGNORED).sum().float()


def _unknown(model: Any) -> str:
    """Say that the loss of *model* is of no known kind."""
    if model.config.is_encoder_decoder:
        return (
            f"{class_name(model)} has an encoder and a decoder, whose loss is not known to be a mean over labels; "
            "train it in a loop of your own"
        )
    known = ", ".join((*NEXT_TOKEN_LOSSES, *_PER_LABEL))
    return (
        f"{class_name(model)} has a loss of type {loss_kind(model)!r}, whose mean is not known; known: {known}. Train "
        "it in a loop of your own"
    )
