"""Test that a run which stops, saves and starts again computes what one computes that does not stop.

Two stops, and not one, find state that a load leaves where it should not be: what every rank has after a load, and only
one of them keeps right after that, is saved from any of them the second time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from nemo_dist.mesh.dtensor import local
from nemo_dist.setup.setup import DistributedSetup
from nemo_dist.testing.equivalence import MAX_NORM, TOLERANCE, Task, checkpoint, tensor_differences, whole_state
from nemo_dist.testing.temp_folders import scratch
from nemo_dist.testing.tensors import rows_of_rank

Stretch = tuple[Mapping[str, Any], int]  # the keywords of ``build``, and the step before which the run stops


@attrs.frozen(kw_only=True)
class Ended:
    """What a rank had at the end of a run: numbers of each step, its own parameters, and the whole canonical ones."""

    losses: Sequence[float]
    norms: Sequence[float]
    own: Mapping[str, Tensor]
    whole: Mapping[str, Tensor]


def run_on_rank(task: Task, weights: Path, folder: Path, stretches: Sequence[Stretch]) -> Ended:
    """Train *task*; between *stretches* save to *folder*, and go on with a new setup, model and optimizer."""
    losses: list[float] = []
    norms: list[float] = []
    for place, (options, end) in enumerate(stretches):
        setup = DistributedSetup.build(**options)
        with setup.runtime(task.load(weights, distributed_setup=setup)) as runtime:
            optimizer = runtime.optimizer(torch.optim.AdamW, **task.optimizer)
            if place:
                runtime.load(folder, optimizer)
            for step in range(len(losses), end):
                batches = [rows_of_rank(batch, runtime) for batch in task.batches(step)]
                losses.append(runtime.forward_backward(batches).item())
                norms.append(runtime.clip_grad_norm_(MAX_NORM).item())
                optimizer.step()
                optimizer.zero_grad()
            if end < task.steps:
                runtime.save(folder, optimizer)
    own = {name: local(parameter).detach().clone() for name, parameter in runtime.named_parameters()}
    whole = whole_state(runtime, dict(runtime.named_parameters()))
    return Ended(losses=losses, norms=norms, own=own, whole=whole)


def assert_resumes(
    pool: Any,
    task: Task | None = None,
    at: Sequence[int] = (2, 4),
    first: Mapping[str, Any] | None = None,
    **options: Any,
) -> None:
    """Assert that a run which stops before the steps *at* goes on as one that does not stop.

    ``task`` has six steps by default. Until the first stop it trains under ``DistributedSetup.build(**first)``, where
    that is given, and otherwise under ``build(**options)``. All numbers of all ranks are compared bit for bit, unless
    *first* is given: then what is common to both setups, up to rounding.
    """
    task = task or Task(steps=6)
    stretches = [(options if place or first is None else first, end) for place, end in enumerate((*at, task.steps))]
    weights = checkpoint(task.specimen, task.seed)
    unstopped = pool.run(run_on_rank, task, weights, scratch("unstopped"), [(options, task.steps)])
    stopped = pool.run(run_on_rank, task, weights, scratch("stopped") / "saved", stretches)
    lines: list[str] = []
    for rank, (found, expected) in enumerate(zip(stopped, unstopped, strict=True)):
        compare = _unequal if first is None else _unlike
        lines += [f"rank {rank}: {line}" for line in compare(found, expected)]
    head = f"saved and loaded after {' and '.join(map(str, at))} steps, a run departs from one that was not stopped:"
    assert not lines, "\n".join([head, *lines])


def _unequal(found: Ended, expected: Ended) -> list[str]:
    """Return what is not bit-equal."""
    lines = _numbers(found, expected, 0.0)
    return lines + [
        f"{name} is not bit-equal" for name, value in found.own.items() if not torch.equal(value, expected.own[name])
    ]


def _unlike(found: Ended, expected: Ended) -> list[str]:
    """Return what differs by more than rounding."""
    parameters = tensor_differences("parameters", found.whole, expected.whole, TOLERANCE)
    return _numbers(found, expected, TOLERANCE) + parameters


def _numbers(found: Ended, expected: Ended, tolerance: float) -> list[str]:
    return [
        f"{what} of step {step}: {one!r}, expected {other!r}"
        for what in ("losses", "norms")
        for step, (one, other) in enumerate(zip(getattr(found, what), getattr(expected, what), strict=True))
        if not abs(one - other) <= tolerance * abs(other)
    ]
