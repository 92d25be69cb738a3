"""Training steps of ours and of peers, taken in turn in the same processes and timed, and what each of them is made of.

A step is forward, backward, gradient clipping and AdamW. Wall time is that of rank 0; the CPU time of its process is
disturbed far less by other work on the machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from figures import Figure
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nemo_dist import DistributedSetup

LIMIT = 1.03
FP32 = {"param_dtype": "float32", "reduce_dtype": "float32"}
VOCABULARY = 4096
_WARM_UP = 3
_ENOUGH = 40  # of each
_LEAST = 8
_SECONDS = 60  # of one case: on a busy machine fewer are taken
_IGNORED = -100

Batch = dict[str, Tensor]
Times = tuple[float, float]  # wall and CPU, milliseconds
Step = Callable[[Batch], float]


def in_turn(steps: Sequence[Step], batches: Iterator[Batch], alike: int) -> list[list[Times]]:
    """Take *steps* in turn on the same batches, on every rank, and return the times of each.

    Raises RuntimeError when the losses of the first *alike* differ: they train the same model on the same data.
    """
    taken: list[list[Times]] = [[] for _ in steps]
    deadline = time.monotonic() + _SECONDS
    while not _enough(len(taken[0]), deadline):
        batch, losses = next(batches), [0.0] * len(steps)
        # Who goes first changes every time: the others find warmer caches.
        turn = len(taken[0]) % len(steps)
        for which in (*range(turn, len(steps)), *range(turn)):
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            losses[which] = steps[which](batch)
            taken[which].append((1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)))
        if any(abs(loss - losses[0]) > 1e-4 * abs(losses[0]) for loss in losses[:alike]):
            raise RuntimeError(f"all train the same model on the same data, but the losses are {losses}")
    return [times[_WARM_UP:] for times in taken]


def _enough(taken: int, deadline: float) -> bool:
    """Whether to stop after *taken* turns; the ranks must agree, and their clocks do not."""
    late = torch.tensor(float(time.monotonic() > deadline))
    dist.all_reduce(late)
    return taken >= _WARM_UP + (_LEAST if late else _ENOUGH)


def figures(what: str, ours: list[Times], peer: list[Times], against: str, limit: float | None = None) -> list[Figure]:
    """Return the wall and the CPU time of a step of *ours* and of *peer*, in milliseconds."""
    return [
        Figure(
            what=f"{what}{kind}",
            unit="ms",
            ours=[times[clock] for times in ours],
            peer=[times[clock] for times in peer],
            against=against,
            limit=limit,
        )
        for clock, kind in enumerate(("", ", CPU time"))
    ]


def batches(rows: int, length: int, seed: int) -> Iterator[Batch]:
    """Yield batches with some labels masked; *seed* is the data-parallel rank."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        tokens = torch.randint(0, VOCABULARY, (rows, length), generator=generator)
        masked = torch.rand(tokens.shape, generator=generator) < 0.2
        yield {"input_ids": tokens, "labels": tokens.masked_fill(masked, _IGNORED)}


def of_runtime(setup: DistributedSetup, model: Any) -> Step:
    """Return a step of *model*, loaded for *setup*, as our documentation writes it."""
    runtime = setup.runtime(model)
    optimizer = runtime.optimizer(torch.optim.AdamW, lr=1e-4)

    def step(batch: Batch) -> float:
        loss = runtime.forward_backward(batch)
        runtime.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def by_hand(model: nn.Module, mean_loss: Callable[[Batch], Tensor], group: Any = None, ranks: int = 1) -> Step:
    """Return a step of *model* as a careful person writes it.

    ``mean_loss``: forward and backward's loss over this rank's labels. ``group``: the *ranks* ranks that see different
    tokens, over which gradients are averaged: the loss is weighted by their token counts, and reported for all.
    """
    meshes: dict[Any, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        meshes.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    optimizer = torch.optim.AdamW([{"params": parameters} for parameters in meshes.values()], lr=1e-4)

    def step(batch: Batch) -> float:
        loss = mean_loss(batch)
        if ranks > 1:
            count = _count(batch)
            total = count.clone()
            dist.all_reduce(total, group=group)
            loss = loss * (count / total * ranks)
        loss.backward()
        _clip(list(meshes.values()))
        optimizer.step()
        optimizer.zero_grad()
        whole = (loss.full_tensor() if isinstance(loss, DTensor) else loss).detach() / ranks
        if ranks > 1:
            dist.all_reduce(whole, group=group)
        return float(whole)

    return step


def _count(batch: Batch) -> Tensor:
    labels = batch["shift_labels"] if "shift_labels" in batch else batch["labels"][:, 1:]
    return (labels != _IGNORED).sum().float()


def _clip(meshes: list[list[nn.Parameter]]) -> None:
    """Clip to a global norm of 1: torch takes the parameters of one mesh at a time."""
    found = [nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]) for group in meshes]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in found]
    norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
    for group in meshes:
        nn.utils.clip_grads_with_norm_(group, 1.0, norm)
