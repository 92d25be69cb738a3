"""Judge what a batch has besides tokens, labels and their mask, where the user's own code reads that by name.

An entry can join rows, or weigh the losses of tokens, which no run on tokens alone shows. So when a batch first has it,
a weightless copy runs on made-up rows with entries of its kind.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from types import CodeType, FunctionType
from typing import Any

import attrs
import torch
from torch import Tensor
from transformers.utils.generic import TransformersKwargs

from nemo_dist.hf_model import class_name, is_own_class, is_own_code, plain_class
from nemo_dist.plugin.hookspecs import Batch
from nemo_dist.training.loss_weighting import OWN_LOSS, is_mean_with
from nemo_dist.training.neighbouring_rows import depends_on_rows

# That every proof at load has, or that transformers' losses know.
_KNOWN = frozenset({"input_ids", "labels", "shift_labels", "attention_mask"})


@attrs.frozen(kw_only=True, eq=False, slots=False)
class BatchEntries:
    """Judges the entries of batches that own code of *model* names; ``apart``: ranks or stages get rows of their own.

    ``weighs``: the loss is the model's own.
    """

    model: Any
    apart: bool
    weighs: bool
    _judged: set[str] = attrs.field(factory=set, init=False)

    def __call__(self, batch: Batch) -> None:
        """Raise ValueError for entries with which rows meet, or the loss is no mean over labels; judged once each."""
        found = {name: value for name, value in batch.items() if name in self._named and isinstance(value, Tensor)}
        tokens = batch.get("input_ids", batch.get("inputs_embeds"))
        if found.keys() <= self._judged or not isinstance(tokens, Tensor):
            return
        names = ", ".join(map(repr, sorted(found)))
        if self.weighs and batch.get("labels") is not None:
            self._judge_loss(names, found, tokens.shape[:2])
        if self.apart:
            where = depends_on_rows(self.model, Samples(found, tokens.shape[:2]))
            if where is not None:
                raise ValueError(
                    f"{class_name(self.model)} computes a row by {names} of the rows beside it (in {where}), and these "
                    "are on other ranks or in other microbatches; compute each row by itself, or train with tp_size "
                    "alone, whose ranks share all rows"
                )
        self._judged.update(found)

    def _judge_loss(self, names: str, found: Mapping[str, Tensor], shape: Sequence[int]) -> None:
        mean = is_mean_with(self.model, Samples(found, shape))
        if mean or (mean is None and found.keys() <= self._standard):
            return
        why = "cannot be checked to be" if mean is None else "is not"
        raise ValueError(
            f"{class_name(self.model)} reads {names} of the batch in its own code, and its loss with that {why} the "
            f"mean over the labels, so ranks and batches cannot be weighted by theirs; {OWN_LOSS}"
        )

    @cached_property
    def _named(self) -> frozenset[str]:
        """The names in own code."""
        kinds: dict[Any, None] = dict.fromkeys(plain_class(one) for one in self.model.modules() if is_own_code(one))
        bases = {base for kind in kinds for base in kind.__mro__ if is_own_class(base)}
        return frozenset(name for base in bases for code in _codes(base) for name in _names(code)) - _KNOWN

    @cached_property
    def _standard(self) -> set[str]:
        """The arguments of the forward that own code derives its own from, of which it mostly makes what that makes."""
        kind: Any = plain_class(self.model)
        forward = next(
            vars(base)["forward"] for base in kind.__mro__ if not is_own_class(base) and "forward" in vars(base)
        )
        return {*inspect.signature(forward).parameters, *TransformersKwargs.__annotations__}


def _codes(kind: type[Any]) -> Iterator[CodeType]:
    """Yield the code of the methods and properties of *kind*, without those that it inherits."""
    for value in vars(kind).values():
        function = inspect.unwrap(getattr(value, "fget", None) or getattr(value, "__func__", value))
        if isinstance(function, FunctionType):
            yield function.__code__


def _names(code: CodeType) -> Iterator[str]:
    """Yield the names and texts in *code*, and in functions inside of it."""
    yield from (*code.co_names, *code.co_varnames)
    for value in code.co_consts:
        if isinstance(value, CodeType):
            yield from _names(value)
        elif isinstance(value, str):
            yield value
        elif isinstance(value, tuple):  # of keywords, or in a comparison
            yield from (one for one in value if isinstance(one, str))


@attrs.frozen(eq=False)
class Samples:
    """Makes values of the kind of *entries* of a batch whose tokens are of *shape*, for other rows and lengths."""

    entries: Mapping[str, Tensor]
    shape: Sequence[int]

    def __call__(self, rows: int, length: int) -> dict[str, Tensor]:
        """Return entries of *rows* rows, of *length* tokens where they are per token."""
        return {name: self._like(value.detach().cpu(), rows, length) for name, value in self.entries.items()}

    def _like(self, value: Tensor, rows: int, length: int) -> Tensor:
        if value.shape[:1] != self.shape[:1]:
            return value  # not one for each row
        value = value[torch.arange(rows) % len(value)]
        if value.shape[1:2] == self.shape[1:]:
            value = value[:, torch.arange(length) % value.shape[1]]
        if value.is_floating_point():  # uneven over rows and tokens, above zero
            numbers = 0.6 + 0.5 * torch.arange(value.numel()).mul(0.7).sin().view(value.shape)
            each = torch.logspace(0.5, -0.5, rows).view(-1, *[1] * (value.ndim - 1))
            return (numbers * each).to(value.dtype)
        if value.dtype == torch.bool or int(value.max()) <= 1:  # a mask, of fewer tokens in every row
            return (
                (torch.arange(value[0].numel()) < value[0].numel() - torch.arange(rows)[:, None])
                .view(value.shape)
                .to(value.dtype)
            )
        return value
