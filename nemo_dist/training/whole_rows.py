"""Call a model without labels, and give its outputs for whole rows, whatever the plugins split."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import attrs
import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput, TransformersKwargs

from nemo_dist.hf_model import is_own_class, plain_class
from nemo_dist.plugin.hookspecs import Batch, RuntimePart

LABELS = ("labels", "shift_labels")
_WITH_ROWS = ("input_ids", "inputs_embeds", *LABELS, "pixel_values", "input_features", "input_values")


@attrs.frozen(kw_only=True, eq=False, slots=False)
class WholeRows:
    """Calls of *model* without labels, and their outputs for whole rows, which ``parts`` of plugins may split."""

    model: Any
    parts: Sequence[RuntimePart] = ()

    @cached_property
    def _taken(self) -> frozenset[str]:
        """The arguments that the model's forward takes, those for its own loss left out."""
        names: set[str] = set()
        for forward in self._forwards():
            parameters = inspect.signature(forward).parameters.values()
            names |= {one.name for one in parameters if one.kind is not one.VAR_KEYWORD}
            if not any(one.kind is one.VAR_KEYWORD for one in parameters):
                break
        else:
            names |= set(TransformersKwargs.__annotations__)
        return frozenset(names - {"self", *LABELS, "num_items_in_batch"})

    def _forwards(self) -> Iterator[Any]:
        """Yield the model's forward, and those that forwards of the user's own may hand their keywords to."""
        yield self.model.forward
        kinds = [kind for kind in plain_class(self.model).__mro__ if "forward" in vars(kind)]
        for kind, base in pairwise(kinds):
            if not is_own_class(kind):
                return
            yield vars(base)["forward"]

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
        here, (_, length) = rows_and_length(inputs), rows_and_length(batch)
        values = {name: value for name, value in outputs.items() if is_per_token(value, here)}
        return Outputs({name: split.join_tokens(value, length) for name, value in values.items()})


class Outputs(SimpleNamespace):
    """Outputs of a model by name, as attributes or as items."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(**values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(
            f"the outputs have no {name!r} here (they have {', '.join(vars(self))}): where ranks share sequences, or "
            "have layers of their own, only values per token can be joined, none by layer; make it from those"
        )

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def __contains__(self, name: str) -> bool:
        return name in vars(self)

    def get(self, name: str, default: Any = None) -> Any:
        """Return the output *name*, or *default*."""
        return vars(self).get(name, default)

    def items(self) -> Any:
        """Return pairs of names and values."""
        return vars(self).items()


def rows_and_length(batch: Batch) -> tuple[int, int]:
    """Return (rows, length) of the tokens in *batch*."""
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(batch.get(name), Tensor):
            rows, length = batch[name].shape[:2]
            return rows, length
    raise ValueError(f"the batch has neither input_ids nor inputs_embeds (it has {sorted(batch)}); add one")


def is_per_token(value: Any, shape: tuple[int, int]) -> bool:
    """Whether *value* is a tensor with a value, or more, for each token of rows of this *shape*."""
    return isinstance(value, Tensor) and value.ndim > 1 and tuple(value.shape[:2]) == shape


def first_rows(outputs: Any, view: Batch, rows: int, real: int) -> tuple[Any, dict[str, Any]]:
    """Return the first *real* of all *rows* of outputs and batch; of a value of a plugin's, what it says they are."""
    return _changed(outputs, view, lambda value: value[:real] if value.shape[:1] == (rows,) else value)


def sizes_of(view: Batch) -> tuple[int, int] | None:
    """Return the rows of *view* and the tokens of each, 0 for none; None where no tensor that is known tells."""
    named = (view.get(name) for name in _WITH_ROWS)
    found = next((one for one in named if isinstance(one, Tensor) and one.ndim), None)
    return None if found is None else (len(found), found.shape[1] if found.ndim > 1 else 0)


def chosen(
    outputs: Any, view: Batch, dim: int, sizes: tuple[int, int], choose: Callable[[Tensor], Tensor]
) -> tuple[Any, dict[str, Any]]:
    """Return outputs and batch with what *choose* makes of tensors of these *sizes*: (rows, ...).

    Or, with *dim* 1, (rows, tokens, ...), as which tensors (rows * tokens, ...), as routers give them, are taken, too.
    """

    def change(value: Tensor) -> Tensor:
        if value.shape[: dim + 1] == sizes[: dim + 1]:
            return choose(value)
        if all(sizes) and value.shape[:1] == (sizes[0] * sizes[1],):
            return choose(value.unflatten(0, sizes)).flatten(0, 1)
        return value

    return _changed(outputs, view, change)


def _changed(outputs: Any, view: Batch, change: Callable[[Tensor], Tensor]) -> tuple[Any, dict[str, Any]]:
    def new(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        if type(value) is tuple:
            return tuple(map(new, value))
        return value.changed(new) if hasattr(type(value), "changed") else value

    found, read = ({name: new(value) for name, value in values.items()} for values in (outputs, view))
    if not isinstance(outputs, ModelOutput):
        return Outputs(found), read
    like = copy.copy(outputs)  # a loss may read it by numbers
    for name, value in found.items():
        like[name] = value
    return like, read


def nothing(outputs: Outputs) -> tuple[Tensor, Tensor]:
    """Return a loss of 0 that depends on the outputs, and a count of 0."""
    floating = [value for _, value in outputs.items() if isinstance(value, Tensor) and value.is_floating_point()]
    # Not a product with 0, which an infinite output would make NaN.
    none = [torch.where(torch.zeros_like(value, dtype=torch.bool), value, 0).sum().float() for value in floating]
    total = torch.stack(none).sum()
    return total, torch.zeros_like(total).detach()
