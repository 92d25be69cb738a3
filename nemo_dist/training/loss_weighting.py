"""Count the labels that a model's loss is the mean over, and reject a model whose loss is anything else.

Losses are weighted by their label counts, which is silently wrong for a model that adds a term to its loss or takes
another mean. Every model computes its loss in its own forward, so that is judged by the names in the forward's code.
Where these do not tell, a weightless copy computes the loss of two rows together and of each by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from nemo_dist.hf_model import (
    IGNORED,
    NEXT_TOKEN_LOSSES,
    class_name,
    has_own_code,
    loss_function_of,
    loss_kind,
    loss_names,
    predicts_next_token,
)
from nemo_dist.training.kept_state import on_copies
from nemo_dist.training.made_up_rows import MadeUpRows
from nemo_dist.training.rehearsal import Rehearsal, same

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nemo_dist.plugin.hookspecs import Batch

OWN_LOSS = "give a loss of your own, setup.runtime(model, loss=...), ready-made ones are in nemo_dist.losses"
_LOADED = "_nemo_dist_loaded_loss"  # in the model's __dict__
_SHIFTS = "_nemo_dist_shifts_labels"  # in the model's __dict__, where a run told
_LENGTH, _VOCABULARY = 8, 24  # of the rows that such a run gets
_MASKS = MadeUpRows({"attention_mask": torch.ones(1, 1, dtype=torch.long)})
_PER_LABEL = (
    *("ForMaskedLM", "ForTokenClassification", "ForSequenceClassification"),
    *("ForImageClassification", "ForVideoClassification", "ForAudioClassification"),
)
REDUCTIONS = ("num_items_in_batch", "ignore_index")  # what transformers' losses take besides labels
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
    refuse_replaced(model)
    kind, names = loss_kind(model), loss_names(model)
    if predicts_next_token(model):
        known = (_MEANS if "loss_function" in names else set()) | (_ROUTERS if routers_known else set())
        if not getattr(model, "z_loss_coefficient", 1):
            known = known | _LOGITS
    else:
        known = _CLASSIFIERS if kind in _PER_LABEL else set()
    strange = sorted(names - known) or ([] if names else ["a part of it"])
    if not strange and has_own_code(model) and _is_mean(model) is False:
        strange = ["its own code"]  # whose names do not say what it adds
    elif not strange or (not predicts_next_token(model) and _is_mean(model)):
        return
    if kind not in _PER_LABEL and not predicts_next_token(model):
        raise ValueError(_unknown(model))
    way_out = f"load it with z_loss_coefficient=0, or {OWN_LOSS}" if strange == sorted(_LOGITS) else OWN_LOSS
    raise ValueError(
        f"{class_name(model)} makes a loss of its own (from {', '.join(strange)}) that is not known to be the mean "
        f"over the labels, so ranks and batches cannot be weighted by theirs; {way_out}"
    )


def remember_loss(model: Any) -> None:
    """Note the loss function of *model* as it was loaded; call it when plugins have done with the model."""
    vars(model)[_LOADED] = loss_function_of(model)


def refuse_replaced(model: Any) -> None:
    """Raise ValueError where the user replaced the loss function of *model* since it was loaded."""
    now = loss_function_of(model)
    if vars(model).get(_LOADED, now) is not now:
        name = getattr(now, "__qualname__", type(now).__qualname__)
        raise ValueError(
            f"the loss_function of {class_name(model)} was replaced after loading (by {name}), and what that is a "
            f"mean over is not known, so ranks and batches cannot be weighted; leave it as it was, and {OWN_LOSS}"
        )


def _is_mean(model: Any) -> bool | None:
    """Whether the loss of *model* is the mean over its labels of -100 or not, shifted or not, which is then noted.

    None where a copy does not run, or makes no number.
    """
    found = is_mean_with(model, MadeUpRows())
    if found is False or not has_own_code(model):
        return found
    masked = [is_mean_with(model, _MASKS, beside) for beside in (False, True)]  # without which own code may not run
    return False if False in masked else found or (True in masked or None)


def is_mean_with(model: Any, entries: MadeUpRows, beside: bool = False) -> bool | None:
    """Whether the loss of *model* is such a mean where the batch has *entries*, too; None as above.

    ``beside``: see ``_rehearsed``. Own code runs in evaluation and in training.
    """
    try:
        rehearsal = Rehearsal.of(model)
        found = _judged(model, *_rehearsed(rehearsal, entries, beside))
        if found and has_own_code(model):
            with rehearsal.training():
                trained = _judged(model, *_rehearsed(rehearsal, entries, beside))
            found = found if rehearsal.draws.unknown else trained
    except Exception:  # whatever a forward of any family raises
        return None
    return found


def _judged(model: Any, losses: Tensor, labels: Tensor) -> bool | None:
    if losses[0].isfinite() and losses.isnan().any():
        return False  # of a row whose labels do not count
    if not losses.isfinite().all():
        return None
    means = []
    for first in (0, 1):  # of the labels that count, where they are shifted
        counts = (labels[:, first:] != IGNORED).sum(1)
        means.append((losses[1:] * counts).sum() / counts.sum())
    shifts = bool((means[1] - losses[0]).abs() < (means[0] - losses[0]).abs())  # rows of like losses may fit both
    if not same(losses[:1], means[shifts][None]):
        return False
    vars(model)[_SHIFTS] = shifts
    return True


def _rehearsed(rehearsal: Rehearsal, entries: MadeUpRows, beside: bool) -> tuple[Tensor, Tensor]:
    """Return the losses of two rows together and of each alone, (3,), and their labels.

    Labels that a mask of *entries* leaves out count, but for those of padding, which own code may cut off. They do
    ``beside`` a row without padding, where each is alone in that the other has no labels.
    """
    model = rehearsal.model
    classes = model.config.num_labels if "Classification" in str(loss_kind(model)) else _VOCABULARY
    tokens = torch.arange(2 * _LENGTH).view(2, _LENGTH) % _VOCABULARY + 3
    labels = (tokens * 5 + 1) % classes
    # Rows of unlike numbers of labels, shifted and not, in unlike relations with and without a mask, and to the tokens.
    labels[0, 2], labels[1, 3:] = IGNORED, IGNORED
    inputs = entries(tokens, labels=labels)
    padding = inputs.get("attention_mask", torch.ones_like(labels)) == 0
    if beside:
        inputs["attention_mask"][0] = 1
        parts = [inputs, *({**inputs, "labels": _only(labels, row)} for row in range(2))]
    else:
        inputs["labels"] = labels = labels.masked_fill(padding, IGNORED)
        parts = [inputs, *(entries.rows(inputs, slice(row, row + 1)) for row in range(2))]
    losses = []
    for part in parts:
        with on_copies([model]):
            given = {name: value.clone() for name, value in part.items()}  # which own code may change
            losses.append(rehearsal.run(given).output.loss.detach().float())
    return torch.stack(losses), labels


def _only(labels: Tensor, row: int) -> Tensor:
    return labels.masked_fill(torch.arange(len(labels))[:, None] != row, IGNORED)


def count_labels(model: nn.Module, batch: Batch) -> Tensor:
    """Return how many labels of *batch* the loss of *model* averages: a 0-dim float32 tensor on the labels' device.

    Next-token losses leave out the first label of a sequence unless ``shift_labels`` are given; labels of -100 never
    count; float labels (regression, multi-label classification) all do, element by element. This is how
    ``transformers.loss`` averages. Raises ValueError for a batch without labels or with an argument that changes the
    mean, and for a model whose loss is none of these.
    """
    for name in REDUCTIONS:
        if batch.get(name) is not None:
            raise ValueError(f"the batch has {name!r}, which changes what the loss is a mean over; leave it out")
    labels: Tensor | None = batch.get("shift_labels", batch.get("labels"))
    if labels is None:
        raise ValueError(f"the batch has no labels (it has {sorted(batch)}); add 'labels', -100 where none counts")
    if labels.is_floating_point():
        return torch.full((), float(labels.numel()), device=labels.device)  # which a device does not wait for
    proven: bool | None = vars(model).get(_SHIFTS)
    if predicts_next_token(model) if proven is None else proven:
        labels = labels if "shift_labels" in batch else labels[..., 1:]
    elif proven is None and loss_kind(model) not in _PER_LABEL:
        raise ValueError(_unknown(model))
    return (labels != IGNORED).sum().float()


def _unknown(model: Any) -> str:
    """Say that the loss of *model* is of no known kind."""
    if not loss_names(model):
        return f"{class_name(model)} has no loss of its own; {OWN_LOSS}"
    if model.config.is_encoder_decoder:
        return (
            f"{class_name(model)} has an encoder and a decoder, whose loss is not known to be a mean over labels; "
            f"{OWN_LOSS}"
        )
    known = ", ".join((*NEXT_TOKEN_LOSSES, *_PER_LABEL))
    return (
        f"{class_name(model)} has a loss of type {loss_kind(model)!r}, whose mean is not known; known: {known}; "
        f"{OWN_LOSS}"
    )
