"""What the loss of a step is: the model's own, or a function of the model's outputs that the user gives.

Both are a sum over what counts (labels, tokens, rows) and that count, so that ranks, batches and microbatches can be
weighted by their counts: the loss of a step is the sum of all sums over the sum of all counts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad

from nemo_dist.hf_model import IGNORED, class_name, has_own_code, predicts_next_token
from nemo_dist.planning.mesh_plan import Role
from nemo_dist.plugin.hookspecs import Batch, RuntimePart
from nemo_dist.training.loss_sums import LossSums
from nemo_dist.training.loss_weighting import count_labels, judge_loss, refuse_replaced
from nemo_dist.training.neighbouring_rows import depends_on_padding, depends_on_rows
from nemo_dist.training.whole_rows import LABELS, WholeRows, first_rows, is_per_token, nothing, rows_and_length

if TYPE_CHECKING:
    from nemo_dist.mesh.mesh_context import MeshContext

READS = "loss."  # in the batches of a step, names of what only the loss reads start with it
# 1 for a row of the batch, 0 for one that an engine appended, or of a batch that was made up: an int tensor on the CPU.
ROWS = f"{READS}rows"

LossFunction = Callable[[Any, Batch], tuple[Any, Any]]


_on_some_ranks: list[bool] = []


@contextmanager
def _apart() -> Iterator[None]:
    """Within the context runs a loss that other ranks of the mesh do not call."""
    _on_some_ranks.append(True)
    try:
        yield
    finally:
        _on_some_ranks.clear()


def refuse_in_losses(model: nn.Module, mesh: MeshContext) -> None:
    """Let *model*, on *mesh*, raise ValueError in a loss that only some ranks call, where its ranks run it together."""
    split = any(mesh.roles.get(axis, Role.BATCH) is not Role.BATCH for axis in mesh.wide())
    if split or (mesh.wide() and any(isinstance(parameter, DTensor) for parameter in model.parameters())):
        model.register_forward_pre_hook(_refuse_in_loss, prepend=True)  # before what the strategy does in it


def _refuse_in_loss(model: nn.Module, *_: Any) -> None:
    if _on_some_ranks:
        raise ValueError(
            f"a loss calls {class_name(model)}, which several ranks run together, on the ranks of the last stage "
            "alone; call it before the step, as runtime.forward(batch), and put the outputs into the batch"
        )


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
        """Return the number of labels that count; raise ValueError for a loss that is no mean over them."""
        refuse_replaced(self.model)
        return count_labels(self.model, batch)

    def __call__(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the sum of the label losses and their number; without an unmasked label the model's mean is 0/0."""
        mean: Tensor = outputs.loss.float()
        count = self.count(batch).to(mean.device)
        return torch.where(count > 0, mean, torch.zeros_like(mean)) * count, count


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
    sums: LossSums = attrs.field(factory=LossSums)

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
        view = {name: value for name, value in batch.items() if name != ROWS}
        rows = {ROWS: batch[ROWS].cpu()} if ROWS in batch else {}
        labels = view.get("labels")
        if self._shifts and isinstance(labels, Tensor) and not labels.is_floating_point():
            view.setdefault("shift_labels", pad(labels, (0, 1), value=IGNORED)[..., 1:])
        split = self._calls.splits
        if split is not None and split.split_tokens is not None and self.per_token:
            if "shift_labels" in view:
                view.pop("labels", None)  # these do not stand beside the outputs that predict them
            shape = rows_and_length(view)
            for name, value in view.items():
                if is_per_token(value, shape):
                    view[name] = split.split_tokens(value, IGNORED if name in LABELS else 0)
        return {f"{READS}{name}": value for name, value in view.items()} | rows

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Return *batch* without what only the loss reads."""
        return {name: value for name, value in batch.items() if not name.startswith(READS)}

    def count(self, batch: Batch) -> Tensor | None:
        """Return what the ``count`` of the function says of *batch*, None where it has none; 0 for one made up."""
        counted = getattr(self.function, "count", None)
        if counted is None:
            return None
        if ROWS in batch and not batch[ROWS].any():
            return torch.zeros(())
        return torch.as_tensor(counted(_view(batch)), dtype=torch.float32)

    def __call__(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the sum of the losses of *batch* and what counts in it; rows that were appended do not count."""
        view = _view(batch)
        if not self.per_token:
            outputs = self._calls.joined(outputs, self.inputs(batch), view)
        rows = batch.get(ROWS)
        if rows is not None and (real := int(rows.sum())) < len(rows):
            outputs, view = first_rows(outputs, view, len(rows), real)
            if real == 0:
                return nothing(outputs)
        if self.rows_together is None:
            return self._run(outputs, view)
        return self.sums(self._run, outputs, view, self.rows_together, _name(self.function))

    def _run(self, outputs: Any, view: Batch) -> tuple[Tensor, Tensor]:
        with _apart() if any(part.engine is not None for part in self.parts) else nullcontext():
            result = self.function(outputs, view)
        total, count = summed(result, self.function)
        if total.requires_grad or not torch.is_grad_enabled():
            return total, count
        if count == 0:  # as where a function returns early
            return nothing(outputs)
        name = _name(self.function)
        raise ValueError(f"the loss {name} does not depend on the model's outputs, or was detached from them")


def chosen_loss(
    given: LossFunction | None,
    model: nn.Module,
    plugins: Mapping[str, RuntimePart],
    mesh: MeshContext,
    routers_known: bool,
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
    rows = mesh.size(Role.BATCH) > 1 or mesh.size(Role.LAYERS) > 1
    tokens = loss.per_token and mesh.size(Role.TOKENS) > mesh.size(Role.BATCH)
    loss.sums.dims = (*([0] if rows else ()), *([1] if tokens else ()))
    for name, part in plugins.items():
        if part.engine is not None:
            _judge_engine(name, part, loss)
    return loss


def refuse_rows_that_meet(model: nn.Module, mesh: MeshContext) -> None:
    """Raise ValueError where ranks or stages get rows of their own, and *model* computes a row by those beside it."""
    if mesh.wide():
        _refuse_embeddings(model)
    apart = mesh.size(Role.TOKENS) > 1 or mesh.size(Role.LAYERS) > 1
    if apart and depends_on_padding(model):
        raise ValueError(
            f"{class_name(model)} attends to later tokens in a batch without padding, and not in one with, and ranks "
            "and microbatches may be of either kind; load it with attn_implementation='eager', which never does"
        )
    where = depends_on_rows(model) if apart and has_own_code(model) else None
    if where is not None:
        raise ValueError(
            f"{class_name(model)} computes a row by the rows beside it (in {where}), and these are on other ranks or "
            "in other microbatches; compute each row by itself, or train with tp_size alone, whose ranks share all rows"
        )


# Options of torch's embeddings by which the tokens of a batch change what others get, and a value that turns each off.
_OF_A_BATCH = {"max_norm": None, "scale_grad_by_freq": False, "sparse": False}


def _refuse_embeddings(model: nn.Module) -> None:
    """Raise ValueError for embeddings of *model* that change their weight, or its gradient, by the tokens of a batch.

    Ranks have other tokens, or parts of the weight, and a norm that is written into a gathered weight is lost.
    """
    for name, module in model.named_modules():
        for option, off in _OF_A_BATCH.items() if isinstance(module, nn.Embedding | nn.EmbeddingBag) else ():
            if getattr(module, option, off) not in (None, False):
                raise ValueError(
                    f"{class_name(model)}: {name} has {option}={getattr(module, option)!r}, by which the tokens of a "
                    f"batch say how rows, or their gradients, change, and ranks have others; set its {option} to {off}"
                )


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


def summed(result: Any, function: Any) -> tuple[Tensor, Tensor]:
    """Return a sum and a count of what *function* returned: losses and weights, or a sum and a count.

    Raises TypeError or ValueError for anything else.
    """
    name = _name(function)
    wanted = (
        f"the loss {name} must return two values: losses and their weights, tensors of one shape, or a sum and a count"
    )
    if not isinstance(result, tuple | list) or len(result) != 2 or not isinstance(result[0], Tensor):
        raise TypeError(f"{wanted} (got {_shown(result)})")
    losses = result[0].float()
    weights = torch.as_tensor(result[1], dtype=torch.float32, device=losses.device).detach()
    if losses.shape != weights.shape:
        raise ValueError(f"{wanted} (got shapes {tuple(losses.shape)} and {tuple(weights.shape)})")
    if losses.ndim:
        losses, weights = (torch.where(weights != 0, losses, 0) * weights).sum(), weights.sum()
    return losses, weights


def _name(function: Any) -> str:
    found: str = getattr(function, "__qualname__", type(function).__qualname__)
    return found


def at_least_something(total: Tensor) -> Tensor:
    """Return *total*, which may be negative, or 1 where nothing counts, and the sum of the losses is 0."""
    return torch.where(total == 0, torch.ones_like(total), total)


def _shown(result: Any) -> str:
    if isinstance(result, Tensor):
        return f"one tensor of shape {tuple(result.shape)}"
    if isinstance(result, tuple | list):
        return f"{len(result)} values of type {', '.join(type(one).__name__ for one in result)}"
    return type(result).__name__


def _view(batch: Batch) -> dict[str, Any]:
    """Return what the loss reads of *batch* under its own names."""
    return {name.removeprefix(READS): value for name, value in batch.items() if name.startswith(READS) and name != ROWS}
