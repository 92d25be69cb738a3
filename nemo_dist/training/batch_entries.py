"""Judge what a batch has besides tokens, labels and their mask, where the user's own code reads that by name.

An entry can join rows, or weigh the losses of tokens, which no run on tokens alone shows. So when a batch first has it,
a weightless copy runs on made-up rows with entries of its kind.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from types import CodeType, FunctionType
from typing import Any

import attrs
from torch import Tensor

from nemo_dist.hf_model import class_name, is_own_class, is_own_code, plain_class
from nemo_dist.plugin.hookspecs import Batch
from nemo_dist.training.loss_weighting import OWN_LOSS, REDUCTIONS, is_mean_with
from nemo_dist.training.made_up_rows import MadeUpRows
from nemo_dist.training.neighbouring_rows import depends_on_rows

# That every proof at load has, or that transformers' losses know.
_KNOWN = frozenset({"input_ids", "labels", "shift_labels", "attention_mask", *REDUCTIONS})


@attrs.frozen(kw_only=True, eq=False, slots=False)
class BatchEntries:
    """Judges the entries of batches that own code of *model* names; ``apart``: ranks or stages get rows of their own.

    ``weighs``: the loss is the model's own.
    """

    model: Any
    apart: bool
    weighs: bool
    _with_loss: set[str] = attrs.field(factory=set, init=False)  # what is judged
    _with_rows: set[str] = attrs.field(factory=set, init=False)

    def __call__(self, batch: Batch) -> None:
        """Raise ValueError for entries with which rows meet, or the loss is no mean over labels; judged once each."""
        found = {name: value for name, value in batch.items() if name in self._named and isinstance(value, Tensor)}
        tokens = batch["input_ids"] if batch.get("input_ids") is not None else batch.get("inputs_embeds")
        if not isinstance(tokens, Tensor) or tokens.ndim < 2 or not tokens.numel():
            return
        labelled = any(batch.get(name) is not None for name in ("labels", "shift_labels"))
        if self.weighs and labelled and not found.keys() <= self._with_loss:
            self._judge_loss(found, tokens.shape[:2])
            self._with_loss.update(found)
        if self.apart and not found.keys() <= self._with_rows:
            self._judge_rows(found, tokens.shape[:2])
            self._with_rows.update(found)

    def _judge_loss(self, found: Mapping[str, Tensor], shape: Sequence[int]) -> None:
        mean = is_mean_with(self.model, MadeUpRows(found, shape))
        wrong = [found] if mean is False else []
        if mean is None and len(found) > 1:  # one that does not fit the made-up rows hides no other
            each = ({name: value} for name, value in found.items())
            wrong = [one for one in each if is_mean_with(self.model, MadeUpRows(one, shape)) is False]
        if wrong:
            raise ValueError(
                f"{class_name(self.model)} reads {_listed(wrong[0])} of the batch in its own code, and its loss with "
                "that is not the mean over the labels, so ranks and batches cannot be weighted by theirs; "
                f"{OWN_LOSS}"
            )

    def _judge_rows(self, found: Mapping[str, Tensor], shape: Sequence[int]) -> None:
        where = depends_on_rows(self.model, MadeUpRows(found, shape))
        if where is not None:
            raise ValueError(
                f"{class_name(self.model)} computes a row by {_listed(found)} of the rows beside it (in {where}), and "
                "these are on other ranks or in other microbatches; compute each row by itself, or train with tp_size "
                "alone, whose ranks share all rows"
            )

    @cached_property
    def _named(self) -> frozenset[str]:
        """The names in own code."""
        kinds: dict[Any, None] = dict.fromkeys(plain_class(one) for one in self.model.modules() if is_own_code(one))
        bases = {base for kind in kinds for base in kind.__mro__ if is_own_class(base)}
        return frozenset(name for base in bases for code in _codes(base) for name in _names(code)) - _KNOWN


def _listed(entries: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(entries)))


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
