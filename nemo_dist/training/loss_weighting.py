"""Count the labels that a model's loss is the mean over, and reject a model whose loss is anything else.

Losses are weighted by their label counts, which is silently wrong for a model that adds a term to its loss or takes
another mean. Every model computes its loss in its own forward, so that is judged by the names in the forward's code.
Where these do not tell, a weightless copy computes the loss of two rows together and of each by itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nemo_dist.hf_model import (
    IGNORED,
    NEXT_TOKEN_LOSSES,
    class_name,
    has_own_code,
    is_own_code,
    loss_function_of,
    loss_kind,
    loss_names,
    plain_class,
    predicts_next_token,
)
from nemo_dist.training.rehearsal import Rehearsal, same

if TYPE_CHECKING:
    from nemo_dist.plugin.hookspecs import Batch

OWN_LOSS = "give a loss of your own, setup.runtime(model, loss=...), ready-made ones are in nemo_dist.losses"
_LOADED = "_nemo_dist_loaded_loss"  # in the model's __dict__
_SHIFTS = "_nemo_dist_shifts_labels"  # in the model's __dict__, where a run told
_JUDGED = "_nemo_dist_judged_inputs"  # in the model's __dict__
_LENGTH, _VOCABULARY = 6, 24  # of the rows that such a run gets
_PER_LABEL = (
    *("ForMaskedLM", "ForTokenClassification", "ForSequenceClassification"),
    *("ForImageClassification", "ForVideoClassification", "ForAudioClassification"),
)
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


def refuse_weighing(model: Any, batch: Batch) -> None:
    """Raise ValueError where a forward of the user's own weighs labels by what it alone takes of *batch*."""
    if not is_own_code(model):
        return
    kind: Any = plain_class(model)  # mypy takes no class for hashable
    names = frozenset(name for name in _own_inputs(kind) if batch.get(name) is not None)
    judged: set[frozenset[str]] = vars(model).setdefault(_JUDGED, {frozenset()})
    if names in judged:
        return
    if _is_mean(model, names, batch) is False:
        raise ValueError(
            f"the loss that {class_name(model)} makes with {', '.join(sorted(names))} of the batch is not the mean "
            f"over the labels, so ranks and batches cannot be weighted by theirs; {OWN_LOSS}"
        )
    judged.add(names)


@lru_cache(maxsize=64)
def _own_inputs(kind: type[Any]) -> frozenset[str]:
    """Return the names that the forward of *kind*, the user's own, takes and that of transformers' class does not."""
    forwards = {base: vars(base).get("forward") for base in kind.__mro__ if base is not nn.Module}
    found = [(base, forward) for base, forward in forwards.items() if forward is not None]
    usual = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels", "shift_labels", "self"}
    theirs = next((forward for base, forward in found if base.__module__.startswith("transformers.")), None)
    known = inspect.signature(theirs).parameters.keys() if theirs is not None else set()
    return frozenset(inspect.signature(found[0][1]).parameters.keys() - known - usual) if found else frozenset()


def _is_mean(model: Any, names: Collection[str] = (), batch: Batch = MappingProxyType({})) -> bool | None:
    """Whether the loss of *model* is the mean over its labels of -100 or not, shifted or not, which is then noted.

    *names*: inputs of *batch* beside tokens and labels. None where a copy does not run, or makes no number.
    """
    try:
        losses, labels = _rehearsed(model, names, batch)
    except Exception:  # whatever a forward of any family raises
        return None
    if not losses.isfinite().all():
        return None
    for shifts in (False, True):
        counts = torch.stack([(row[1:] if shifts else row) != IGNORED for row in labels]).sum(1)
        if same(losses[:1], ((losses[1:] * counts).sum() / counts.sum())[None]):
            vars(model)[_SHIFTS] = shifts
            return True
    return False


def _rehearsed(model: Any, names: Collection[str], batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the losses of two rows together and of each alone, (3,), and their labels; of a weightless copy."""
    rehearsal = Rehearsal.of(model)
    classes = model.config.num_labels if "Classification" in str(loss_kind(model)) else _VOCABULARY
    tokens = torch.arange(2 * _LENGTH).view(2, _LENGTH) % _VOCABULARY + 3
    labels = (tokens * 5 + 1) % classes
    labels[0, 0], labels[1, 2:] = IGNORED, IGNORED  # rows of unlike numbers of labels, both shifted and not
    of_batch: Any = batch.get("labels")
    shape = () if of_batch is None else tuple(of_batch.shape[:2])
    by_row = {name: _two_rows(batch[name]) for name in names if _is_by_row(batch[name], shape)}
    fixed = {name: batch[name] for name in names if name not in by_row}
    by_row |= {"input_ids": tokens, "labels": labels}
    rows = (slice(None), slice(0, 1), slice(1, 2))
    runs = [rehearsal.run({**fixed, **{name: value[row] for name, value in by_row.items()}}) for row in rows]
    return torch.stack([run.output.loss.detach().float() for run in runs]), labels


def _is_by_row(value: Any, shape: tuple[int, ...]) -> bool:
    """Whether *value* has an entry for each row of a batch with labels of *shape*; of one row, for each token."""
    if not isinstance(value, Tensor) or not value.ndim or value.shape[:1] != shape[:1]:
        return False
    return shape[0] > 1 or (value.ndim > 1 and tuple(value.shape[:2]) == shape)


def _two_rows(value: Tensor) -> Tensor:
    """Return an input like *value* for two rows of few tokens: floats are made up, as those of a batch may be equal."""
    found = value.detach().cpu()
    for axis, size in enumerate((2, _LENGTH)[: value.ndim]):
        found = found.index_select(axis, torch.arange(size) % value.shape[axis])
    if not found.is_floating_point():
        return found
    return (torch.arange(1.0, found.numel() + 1).sin() + 1.5).view(found.shape).to(found.dtype)


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
