"""What the conformance kit runs on every rank for what is the user's: batches, modes, groups of options, runtimes."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nemo_dist.testing.conformance_runs import loaded
from nemo_dist.testing.equivalence import Task, whole_state
from nemo_dist.testing.tensors import rows_of_rank


def on_rank_again(task: Task, folder: Path, build: Mapping[str, Any]) -> list[str]:
    """Return what differs between two runtimes of one model, which have nothing but a backward each between them."""
    setup, model = loaded(task, folder, build)
    found = []
    for _ in range(2):
        runtime = setup.runtime(model)
        optimizer = runtime.optimizer(torch.optim.AdamW, **task.optimizer)
        batch = rows_of_rank(task.batches(0)[0], runtime)
        runtime.evaluate([batch])
        loss = runtime.forward_backward(batch).item()
        runtime.metrics()
        named: dict[str, Tensor] = dict(runtime.named_parameters())
        gradients = whole_state(runtime, {name: p.grad for name, p in named.items() if p.grad is not None})
        found.append((loss, gradients, whole_state(runtime, named)))
        optimizer.zero_grad()
        runtime.close()
    (loss, *before), (again, *after) = found
    lines = [f"the loss is {again!r}, and was {loss!r}"] * (again != loss)
    for what, tensors, others in zip(("gradient", "weight"), before, after, strict=True):
        lines += [f"the {what} of {name} is another one" for name in tensors if not _same(tensors, others, name)]
    return lines


def _same(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor], name: str) -> bool:
    return name in others and torch.equal(tensors[name], others[name])


def on_rank_untouched(task: Task, folder: Path, build: Mapping[str, Any]) -> list[str]:
    """Return what a step changes that is the user's: the batch, random generators, the mode of modules."""
    setup, model = loaded(task, folder, build)
    modules = {name: module for part in getattr(model, "parts", [model]) for name, module in part.named_modules()}
    modes = {name: module.training for name, module in modules.items()}
    _ = torch.rand(1), random.random()  # so that a seed anew is seen
    generators = torch.get_rng_state(), random.getstate()
    runtime = setup.runtime(model)
    optimizer = runtime.optimizer(torch.optim.AdamW, **task.optimizer)
    batch = rows_of_rank(task.batches(0)[0], runtime)
    kept = {name: value.clone() for name, value in batch.items()}
    runtime.forward_backward(batch)
    optimizer.step()
    runtime.close()
    changed = [name for name in {**kept, **batch} if not (name in batch and _same(kept, batch, name))]
    lines = [f"{name} of the batch that it was given" for name in changed]
    lines += ["torch's random generator"] * (not torch.equal(generators[0], torch.get_rng_state()))
    lines += ["Python's random generator"] * (generators[1] != random.getstate())
    return lines + [
        f"training of module {name!r}" for name, module in modules.items() if module.training != modes[name]
    ]


def on_rank_groups(task: Task, folder: Path, build: Mapping[str, Any]) -> dict[str, Tensor]:
    """Train norms and the others in groups of other options, which change after a step; return the parameters."""
    setup, model = loaded(task, folder, build)
    runtime = setup.runtime(model)
    optimizer = runtime.optimizer(torch.optim.AdamW, _groups(runtime.named_parameters()), **task.optimizer)
    for step in range(task.steps):
        runtime.forward_backward(rows_of_rank(task.batches(step)[0], runtime))
        optimizer.step()
        optimizer.zero_grad()
        _slow_down(optimizer)
    found = whole_state(runtime, dict(runtime.named_parameters()))
    runtime.close()
    return found


def plain_groups(task: Task, folder: Path) -> dict[str, Tensor]:
    """Return what ``on_rank_groups`` gives on one process, with plain transformers and torch."""
    model = task.load(folder)
    optimizer = torch.optim.AdamW(_groups(model.named_parameters()), **task.optimizer)
    for step in range(task.steps):
        model(**task.batches(step)[0]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        _slow_down(optimizer)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _groups(named: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    norms = [parameter for name, parameter in trained if "norm" in name]
    others = [parameter for name, parameter in trained if "norm" not in name]
    return [{"params": others}, {"params": norms, "lr": 2e-2, "weight_decay": 0.0}]


def _slow_down(optimizer: Any) -> None:
    """Change the learning rates as a scheduler does."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] / 2
