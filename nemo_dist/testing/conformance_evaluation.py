"""What the conformance kit evaluates on every rank and on one process: the mean loss of uneven batches, and logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from nemo_dist.hf_model import IGNORED, predicts_next_token
from nemo_dist.testing.conformance_runs import loaded
from nemo_dist.testing.equivalence import MAX_NORM, Task
from nemo_dist.testing.tensors import rows_of_rank

STEPS = 2  # of training, before the second evaluation


@attrs.frozen(kw_only=True)
class Evaluated:
    """What an evaluation gave: the ``loss`` of all batches, and the ``logits`` of the rows of one rank of ``dp_size``.

    Logits of tokens that a mask leaves out are 0, as they depend on the kernel.
    """

    loss: float
    logits: Tensor
    dp_rank: int = 0
    dp_size: int = 1


def on_rank_evaluated(task: Task, folder: Path, build: Mapping[str, Any]) -> list[Evaluated]:
    """Evaluate new weights, and those after training; the first data-parallel rank has one more batch than others."""
    setup, model = loaded(task, folder, build)
    found = []
    with setup.runtime(model) as runtime:
        optimizer = runtime.optimizer(torch.optim.AdamW, **task.optimizer)
        for steps in (0, STEPS):
            for step in range(steps):
                runtime.forward_backward(rows_of_rank(task.batches(step)[0], runtime))
                runtime.clip_grad_norm_(MAX_NORM)
                optimizer.step()
                optimizer.zero_grad()
            batch = rows_of_rank(_batch(task), runtime)
            batches = [batch, _more(task)] if runtime.dp_rank == 0 else [batch]
            found.append(
                Evaluated(
                    loss=runtime.evaluate(batches).item(),
                    logits=_seen(runtime.forward(batch).logits, batch),
                    dp_rank=runtime.dp_rank,
                    dp_size=runtime.dp_size,
                )
            )
    return found


def plain_evaluated(task: Task, folder: Path) -> list[Evaluated]:
    """Return what ``on_rank_evaluated`` gives on one process, with plain transformers and torch."""
    model = task.load(folder)
    optimizer = torch.optim.AdamW(model.parameters(), **task.optimizer)
    found = []
    for steps in (0, STEPS):
        for step in range(steps):
            model(**task.batches(step)[0]).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()
        found.append(_plain(model, task))
    return found


def wrong(found: Sequence[Sequence[Evaluated]], expected: Sequence[Evaluated], error: float) -> list[str]:
    """Return a line for each value of the ranks in *found* that is off by more than *error* of its norm."""
    lines = []
    for rank, own in enumerate(found):
        for when, one, other in zip(("new", "trained"), own, expected, strict=True):
            where = f"rank {rank}, {when} weights"
            if not abs(one.loss - other.loss) <= error * abs(other.loss):
                lines.append(f"{where}: the evaluated loss is {one.loss!r}, expected {other.loss!r}")
            logits = other.logits.chunk(one.dp_size)[one.dp_rank]
            if one.logits.shape != logits.shape:
                lines.append(f"{where}: logits have shape {tuple(one.logits.shape)}, expected {tuple(logits.shape)}")
            elif not (off := float((one.logits - logits).norm() / logits.norm())) <= error:
                lines.append(f"{where}: logits are off by {off:.2e} of their norm")
    return lines


def _batch(task: Task) -> Mapping[str, Tensor]:
    return task.batches(STEPS)[0]


def _more(task: Task) -> Mapping[str, Tensor]:
    """Return a batch of other sizes, which one data-parallel rank has besides."""
    return attrs.evolve(task, rows=4, length=8).batches(STEPS + 1)[0]


@torch.no_grad()
def _plain(model: Any, task: Task) -> Evaluated:
    total, count = 0.0, 0
    # The load balancing loss of routers is one of a training step.
    off = {"output_router_logits": False} if getattr(model.config, "output_router_logits", False) else {}
    for batch in (_batch(task), _more(task)):
        labels = batch["labels"][:, 1:] if predicts_next_token(model) else batch["labels"]
        counted = int((labels != IGNORED).sum())
        total += model(**batch, **off).loss.item() * counted
        count += counted
    return Evaluated(loss=total / count, logits=_seen(model(**_batch(task), **off).logits, _batch(task)))


def _seen(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    logits, mask = logits.detach().float().cpu(), batch.get("attention_mask")
    return logits if mask is None or logits.ndim < 3 else logits * mask.unsqueeze(-1)
