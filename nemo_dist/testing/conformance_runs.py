"""What the conformance kit runs on every rank: stretches of training with saves and loads, and what is left behind."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from nemo_dist.errors import RankError
from nemo_dist.setup.setup import DistributedSetup
from nemo_dist.testing.equivalence import MAX_NORM, Task, whole_state
from nemo_dist.testing.tensors import rows_of_rank
from nemo_dist.testing.tiny_models import SPECIMENS
from nemo_dist.testing.worker import count_groups
from nemo_dist.training.runtime import Runtime


@attrs.frozen(kw_only=True)
class Stretch:
    """Steps ``start`` to ``stop`` of a run: from a checkpoint where ``load`` names one, with a save or export after.

    Folders are names in the folder of the whole run.
    """

    start: int
    stop: int
    load: str | None = None
    save: str | None = None
    export: str | None = None


@attrs.frozen(kw_only=True)
class Stretched:
    """What a stretch gave on one rank: the numbers of every step, and the whole parameters before and after it."""

    numbers: Sequence[tuple[float, float]]
    before: Mapping[str, Tensor]
    after: Mapping[str, Tensor]


@attrs.frozen(kw_only=True)
class Left:
    """What there was of process groups and threads after the first, and after the last of several equal runs."""

    groups: tuple[int, int]
    threads: tuple[int, int]
    plain_loss: float


def loaded(task: Task, folder: Path, build: Mapping[str, Any]) -> tuple[DistributedSetup, Any]:
    """Return the setup of *build*, and the model in *folder* under it; called on every rank."""
    setup = DistributedSetup.build(**build)
    return setup, task.load(folder, distributed_setup=setup)


def on_rank_refusal(
    task: Task, folder: Path, build: Mapping[str, Any], kinds: tuple[type[Exception], ...] = (ValueError,)
) -> str:
    """Return the words of the error, one of *kinds*, with which *build* refuses the model in *folder*, or none."""
    try:
        loaded(task, folder, build)
    except kinds as refusal:
        return str(refusal)
    return ""


def started(task: Task, folder: Path, build: Mapping[str, Any]) -> tuple[Runtime, Any]:
    """Return a runtime of the model in *folder* under *build*, and an optimizer; called on every rank."""
    setup, model = loaded(task, folder, build)
    runtime = setup.runtime(model)
    return runtime, runtime.optimizer(torch.optim.AdamW, **task.optimizer)


def on_rank_stretches(
    task: Task, folder: Path, run: Path, stretches: Sequence[tuple[Mapping[str, Any], Stretch]]
) -> list[Stretched]:
    """Train each stretch under its build, with a model and optimizer of its own."""
    return [_stretch(task, folder, run, build, stretch) for build, stretch in stretches]


def _stretch(task: Task, folder: Path, run: Path, build: Mapping[str, Any], stretch: Stretch) -> Stretched:
    runtime, optimizer = started(task, folder, build)
    if stretch.load is not None:
        runtime.load(run / stretch.load, optimizer)
    before = whole_state(runtime, dict(runtime.named_parameters()))
    numbers = [_step(task, runtime, optimizer, step) for step in range(stretch.start, stretch.stop)]
    if stretch.save is not None:
        runtime.save(run / stretch.save, optimizer)
    if stretch.export is not None:
        runtime.export(run / stretch.export)
    after = whole_state(runtime, dict(runtime.named_parameters()))
    runtime.close()
    return Stretched(numbers=numbers, before=before, after=after)


def _step(task: Task, runtime: Runtime, optimizer: Any, step: int) -> tuple[float, float]:
    """Take an optimizer step; return the loss and the norm before clipping."""
    batches = [rows_of_rank(batch, runtime) for batch in task.batches(step)]
    loss = runtime.forward_backward(batches if len(batches) > 1 else batches[0]).item()
    norm = runtime.clip_grad_norm_(MAX_NORM).item()
    optimizer.step()
    optimizer.zero_grad()
    return loss, norm


def has_own_loop(runtime: Runtime) -> bool:
    """Whether the user runs the model of *runtime*, and no plugin does by an engine of its own."""
    return isinstance(runtime.model, nn.Module) and not any(part.engine for part in runtime.plugins.values())


def on_rank_own_loop(task: Task, folder: Path, build: Mapping[str, Any]) -> tuple[Any, Any] | None:
    """Return the gradients of two backwards, the first within ``no_sync``, and the sum of those of each alone.

    None for a model that a plugin runs by an engine of its own: it has no loop of the user's.
    """
    runtime, optimizer = started(task, folder, build)
    if not has_own_loop(runtime):
        return None
    batches = [runtime.batch(rows_of_rank(task.batches(step)[0], runtime)) for step in range(2)]

    def backward(batch: Mapping[str, Any]) -> None:
        runtime.model(**batch).loss.backward()

    def gradients() -> dict[str, Tensor]:
        found = {name: p.grad for name, p in runtime.named_parameters() if p.grad is not None}
        whole = {name: tensor.clone() for name, tensor in whole_state(runtime, found).items()}
        optimizer.zero_grad()
        return whole

    apart = []
    for batch in batches:
        backward(batch)
        apart.append(gradients())
    with runtime.no_sync():
        backward(batches[0])
    backward(batches[1])
    together = gradients()
    runtime.close()
    return together, {name: apart[0][name] + apart[1][name] for name in apart[0]}


def on_rank_repeat(task: Task, folder: Path, build: Mapping[str, Any]) -> Left:
    """Train under *build* three times, close each runtime, and count what is left; then run a plain model."""
    counts = []
    for _ in range(3):
        _stretch(task, folder, folder, build, Stretch(start=0, stop=1))
        counts.append((count_groups(), threading.active_count()))
    plain = SPECIMENS[task.specimen].make(task.seed)
    with torch.no_grad():
        loss = plain(**task.batches(0)[0]).loss.item()
    return Left(groups=(counts[0][0], counts[-1][0]), threads=(counts[0][1], counts[-1][1]), plain_loss=loss)


def on_rank_two_setups(tasks: Sequence[tuple[Task, Path]], build: Mapping[str, Any]) -> list[list[tuple[float, float]]]:
    """Train a setup for each of *tasks*, with the weights of its folder, in turn; return the numbers of each."""
    both = [started(task, folder, build) for task, folder in tasks]
    numbers: list[list[tuple[float, float]]] = [[] for _ in tasks]
    for step in range(2):
        for index, (runtime, optimizer) in enumerate(both):
            numbers[index].append(_step(tasks[index][0], runtime, optimizer, step))
    for runtime, _ in both:
        runtime.close()
    return numbers


def on_rank_disagree(builds: Sequence[Mapping[str, Any]]) -> str:
    """Build a setup of its own on each rank; return the error that its mesh raises."""
    build = builds[torch.distributed.get_rank() % len(builds)]
    try:
        _ = DistributedSetup.build(**build).mesh_context
    except RankError as error:
        return str(error)
    return ""
