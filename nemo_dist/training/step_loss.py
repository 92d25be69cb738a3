"""What the loss of a step is: the model's own, or a function of the model's outputs that the user gives.

Both are a sum over what counts (labels, tokens, rows) and that count, so that ranks, batches and microbatches can be
weighted by their counts: the loss of a step is the sum of all sums over the sum of all counts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from types import SimpleNamespace
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.utils.generic import TransformersKwargs

from nemo_dist.hf_model import IGNORED, predicts_next_token
from nemo_dist.plugin.hookspecs import Batch, RuntimePart
from nemo_dist.training.loss_weighting import count_labels, judge_loss, refuse_replaced

READS = "loss."  # in the batches of a step, names of what only the loss reads start with it
ROWS = f"{READS}rows"  # 1 for a row of the batch, 0 for one that an engine appended: an int tensor on the CPU
_LABELS = ("labels", "shift_labels")

LossFunction = Callable[[Any, Batch], tuple[Any, Any]]


class StepLoss(Protocol):
    """The loss of a batch, or of some of its rows, as a sum and a count."""

    def model_inputs(self, batch: Batch) -> dict[str, Any]:
        """Return what the model's forward gets of *batch*."""

    def reads(self, batch: Batch) -> dict[str, Any]:
        """Return what the loss reads of *batch* besides, under names that start with ``READS``."""

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Return *batch* without what only the loss reads."""

    def count(self, batch: Batch) -> Tensor | None:
        """Return what counts in *batch*, 0-dim float32, or None where only the outputs tell."""

    def __call__(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the sum of the losses of *batch* and what counts in it, 0-dim float32 tensors."""


@attrs.frozen(eq=False)
class ModelLoss:
    """The loss that *model* computes itself from labels, their mean."""

    model: nn.Module

    def model_inputs(self, batch: Batch) -> dict[str, Any]:
        """Return all of *batch*."""
        return dict(batch)

    def reads(self, batch: Batch) -> dict[str, Any]:
        """Return nothing: the model gets the labels."""
        return {}

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Return *batch*, without what an engine adds for a loss."""
        return {name: value for name, value in batch.items() if not name.startswith(READS)}

    def count(self, batch: Batch) -> Tensor:
        """Return the number of labels that count; raise ValueError for a loss function that was replaced."""
        refuse_replaced(self.model)
        return count_labels(self.model, batch)

    def __call__(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the sum of the label losses and their number; without an unmasked label the model's mean is 0/0."""
        mean: Tensor = outputs.loss.float()
        count = self.count(batch).to(mean.device)
        return torch.where(count > 0, mean, torch.zeros_like(mean)) * count, count


@attrs.frozen(kw_only=True, eq=False, slots=False)
class WholeRows:
    """Calls of *model* without labels, and their outputs for whole rows, which ``parts`` of plugins may split."""

    model: Any
    parts: Sequence[RuntimePart] = ()

    @cached_property
    def _taken(self) -> frozenset[str]:
        """The arguments that the model's forward takes, those for its own loss left out."""
        parameters = inspect.signature(self.model.forward).parameters
        names = {name for name, one in parameters.items() if one.kind is not one.VAR_KEYWORD}
        if len(names) < len(parameters):
            names |= set(TransformersKwargs.__annotations__)
        return frozenset(names - {*_LABELS, "num_items_in_batch"})

    @cached_property
    def splits(self) -> RuntimePart | None:
        """What a plugin gives that splits sequences, if one does."""
        return next((part for part in self.parts if part.join_tokens is not None), None)

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Return the arguments of the forward in *batch*, without labels; with those that a decoder gets for labels."""
        inputs = {name: value for name, value in batch.items() if name in self._taken}
        labels = batch.get("labels")
        given = any(inputs.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds"))
        if self.model.config.is_encoder_decoder and labels is not None and not given:
            shift = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
            if shift is None:  # then the forward shifts them, and computes a loss that nobody reads
                return {**inputs, "labels": labels}
            inputs["decoder_input_ids"] = shift(labels=labels)
        return inputs

    def joined(self, outputs: Any, inputs: Batch, batch: Batch) -> Any:
        """Return the *outputs* for whole rows, those of *batch*, where this rank was given a part, *inputs*."""
        split: Any = self.splits
        if split is None:
            return outputs
        here, (_, length) = _tokens(inputs), _tokens(batch)
        values = {name: value for name, value in outputs.items() if _is_per_token(value, here)}
        return Outputs({name: split.join_tokens(value, length) for name, value in values.items()})


@attrs.frozen(kw_only=True, eq=False, slots=False)
class OwnLoss:
    """A loss that is ``function(outputs, batch)``, for a *model* that is called without labels.

    The function gets whole rows and whole logits, as on one process, whatever the topology: ``parts`` of plugins that
    split sequences join the outputs. With an attribute ``per_token = True`` it gets this rank's tokens instead, and
    ``shift_labels``.
    """

    function: LossFunction
    model: Any
    parts: Sequence[RuntimePart] = ()

    @cached_property
    def _calls(self) -> WholeRows:
        return WholeRows(model=self.model, parts=self.parts)

    @cached_property
    def _shifts(self) -> bool:
        return predicts_next_token(self.model)

    @property
    def per_token(self) -> bool:
        """Whether the loss of a token depends on the outputs for that token only."""
        return bool(getattr(self.function, "per_token", False))

    @property
    def rows_together(self) -> int | None:
        """How many neighbouring rows the loss takes together; None where all rows of a batch."""
        found: int | None = getattr(self.function, "rows_together", 1)
        return found

    def model_inputs(self, batch: Batch) -> dict[str, Any]:
        """Return the arguments of the forward in *batch*, without labels."""
        return self._calls.inputs(batch)

    def reads(self, batch: Batch) -> dict[str, Any]:
        """Return what ``function`` gets as the batch: all of it, and the labels of a next-token model shifted."""
        view = dict(batch)
        labels = view.get("labels")
        if self._shifts and isinstance(labels, Tensor) and not labels.is_floating_point():
            view.setdefault("shift_labels", pad(labels, (0, 1), value=IGNORED)[..., 1:])
        split = self._calls.splits
        if split is not None and split.split_tokens is not None and self.per_token:
            if "shift_labels" in view:
                view.pop("labels", None)  # these do not stand beside the outputs that predict them
            shape = _tokens(view)
            for name, value in view.items():
                if _is_per_token(value, shape):
                    view[name] = split.split_tokens(value, IGNORED if name in _LABELS else 0)
        return {f"{READS}{name}": value for name, value in view.items()}

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Return *batch* without what only the loss reads."""
        return {name: value for name, value in batch.items() if not name.startswith(READS)}

    def count(self, batch: Batch) -> Tensor | None:
        """Return what the ``count`` of the function says of *batch*, None where it has none."""
        counted = getattr(self.function, "count", None)
        if counted is None:
            return None
        return torch.as_tensor(counted(_view(batch)), dtype=torch.float32)

    def __call__(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the sum of the losses of *batch* and what counts in it; rows that were appended do not count."""
        view = _view(batch)
        if not self.per_token:
            outputs = self._calls.joined(outputs, self.inputs(batch), view)
        rows = batch.get(ROWS)
        if rows is not None and (real := int(rows.sum())) < len(rows):
            outputs, view = _first_rows(outputs, view, len(rows), real)
            if real == 0:
                return _nothing(outputs)
        return summed(self.function(outputs, view), self.function)


def chosen_loss(
    given: LossFunction | None, model: nn.Module, plugins: Mapping[str, RuntimePart], routers_known: bool
) -> ModelLoss | OwnLoss:
    """Return the loss of a step: the user's where one is *given*, one that a plugin asks for, or that of *model*.

    Raises ValueError with a way out where the loss cannot be computed exactly with these *plugins*.
    """
    asked = {name: part.loss for name, part in plugins.items() if part.loss is not None}
    if given is not None and asked:
        raise ValueError(f"plugin {next(iter(asked))!r} was given a loss in its options; leave out that or loss=")
    functions = [given] if given is not None else list(asked.values())
    if not functions:
        judge_loss(model, routers_known)
        if reasons := [part.needs_loss for part in plugins.values() if part.needs_loss]:
            raise ValueError("; ".join(reasons))
        return ModelLoss(model)
    if not callable(functions[0]):
        raise TypeError(f"loss must be a function of the model's outputs and the batch (got {functions[0]!r})")
    loss = OwnLoss(function=functions[0], model=model, parts=tuple(plugins.values()))
    for name, part in plugins.items():
        if part.engine is not None:
            _judge_engine(name, part, loss)
    return loss


def _judge_engine(name: str, part: RuntimePart, loss: OwnLoss) -> None:
    """Raise ValueError where the engine of plugin *name* cannot compute *loss*."""
    if part.engine is not None and "loss" not in inspect.signature(part.engine).parameters:
        raise ValueError(f"plugin {name!r} runs the batches with the model's own loss only; leave out loss= or it")
    together = loss.rows_together
    if part.rows and together is None:
        raise ValueError(
            f"the loss compares all rows of a batch with each other, and plugin {name!r} runs {part.rows} at a time; "
            "use a setup without it"
        )
    if part.rows and together is not None and part.rows % together:
        raise ValueError(
            f"the loss takes {together} neighbouring rows together, and plugin {name!r} runs {part.rows} at a time; "
            f"run a multiple of {together} at a time"
        )


class Outputs(SimpleNamespace):
    """Outputs of a model by name, as attributes or as items."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(**values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(
            f"the outputs have no {name!r} here (they have {', '.join(vars(self))}): where ranks share sequences, only "
            "values per token can be joined; make it from those"
        )

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def get(self, name: str, default: Any = None) -> Any:
        """Return the output *name*, or *default*."""
        return vars(self).get(name, default)

    def items(self) -> Any:
        """Return pairs of names and values."""
        return vars(self).items()


def summed(result: Any, function: Any) -> tuple[Tensor, Tensor]:
    """Return a sum and a count of what *function* returned: losses and weights, or a sum and a count.

    Raises TypeError or ValueError for anything else.
    """
    name = getattr(function, "__qualname__", type(function).__qualname__)
    wanted = (
        f"the loss {name} must return two values: losses and their weights, tensors of one shape, or a sum and a count"
    )
    if not isinstance(result, tuple | list) or len(result) != 2 or not isinstance(result[0], Tensor):
        raise TypeError(f"{wanted} (got {_shown(result)})")
    losses = result[0].float()
    weights = torch.as_tensor(result[1], dtype=torch.float32, device=losses.device).detach()
    if losses.shape != weights.shape:
        raise ValueError(f"{wanted} (got shapes {tuple(losses.shape)} and {tuple(weights.shape)})")
    if torch.is_grad_enabled() and not losses.requires_grad:
        raise ValueError(f"the loss {name} does not depend on the model's outputs, or was detached from them")
    if losses.ndim:
        losses, weights = (torch.where(weights != 0, losses, 0) * weights).sum(), weights.sum()
    return losses, weights


def _shown(result: Any) -> str:
    if isinstance(result, Tensor):
        return f"one tensor of shape {tuple(result.shape)}"
    if isinstance(result, tuple | list):
        return f"{len(result)} values of type {', '.join(type(one).__name__ for one in result)}"
    return type(result).__name__


def _view(batch: Batch) -> dict[str, Any]:
    """Return what the loss reads of *batch* under its own names."""
    return {name.removeprefix(READS): value for name, value in batch.items() if name.startswith(READS) and name != ROWS}


def _tokens(batch: Batch) -> tuple[int, int]:
    """Return (rows, length) of the tokens in *batch*."""
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(batch.get(name), Tensor):
            rows, length = batch[name].shape[:2]
            return rows, length
    raise ValueError(f"the batch has neither input_ids nor inputs_embeds (it has {sorted(batch)}); add one")


def _is_per_token(value: Any, shape: tuple[int, int]) -> bool:
    return isinstance(value, Tensor) and value.ndim > 1 and tuple(value.shape[:2]) == shape


def _first_rows(outputs: Any, view: Batch, rows: int, real: int) -> tuple[Outputs, dict[str, Any]]:
    """Return the first *real* of all *rows* of outputs and batch."""

    def cut(values: Any) -> dict[str, Any]:
        has_rows = {name for name, value in values if isinstance(value, Tensor) and value.shape[:1] == (rows,)}
        return {name: value[:real] if name in has_rows else value for name, value in values}

    return Outputs(cut(outputs.items())), cut(view.items())


def _nothing(outputs: Outputs) -> tuple[Tensor, Tensor]:
    """Return a loss of 0 that depends on the outputs, and a count of 0."""
    floating = [value for _, value in outputs.items() if isinstance(value, Tensor) and value.is_floating_point()]
    total = torch.stack([value.sum().float() for value in floating]).sum()
    return total, torch.zeros_like(total).detach()
