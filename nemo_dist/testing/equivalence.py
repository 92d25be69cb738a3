"""Test a composition of plugins: train with it and on one process, and compare every number.

``reference`` trains plain transformers on one process on the whole batch; ``trained`` trains the same checkpoint on the
ranks of a pool under a setup; ``differences`` lists where the results differ. Both clip the gradient norm and take
AdamW steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import attrs
import torch
from torch import Tensor

from nemo_dist.setup.setup import DistributedSetup
from nemo_dist.testing.kit_adapters import adapted
from nemo_dist.testing.localise import FACTOR, MOST
from nemo_dist.testing.temp_folders import scratch
from nemo_dist.testing.tensors import rows_of_rank, whole
from nemo_dist.testing.tiny_models import SPECIMENS
from nemo_dist.training.runtime import Runtime

# An eps well above rounding noise: where a gradient is zero in exact arithmetic (the bias of a key), AdamW would divide
# the noise by itself and take full steps, on one process as on many.
OPTIMIZER: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-5}
MAX_NORM = 0.5
TOLERANCE = 1e-5
_FEW = 16


@attrs.frozen(kw_only=True)
class Task:
    """What to train: a tiny model on global batches of ``rows`` x ``length`` tokens, ``accumulate`` batches per step.

    ``lr``, ``weight_decay`` and ``eps`` are AdamW's. A large ``lr`` with a small ``eps`` amplifies rounding errors
    until one process in float32 differs from float64 by more than the tolerance; a larger ``eps`` keeps the comparison
    strict. ``frozen``: prefixes of the names of parameters that are not trained. ``adapters``: whether PEFT's LoRA
    beside every linear layer of the blocks is trained, and nothing else. ``dtype``: of parameters; "float64" for what
    jumps where a number crosses a bound, as rounding to a few bits does: then no last bit decides.
    """

    specimen: str = "llama"
    rows: int = 8
    length: int = 12
    steps: int = 3
    accumulate: int = 1
    seed: int = 0
    lr: float = OPTIMIZER["lr"]
    weight_decay: float = OPTIMIZER["weight_decay"]
    eps: float = OPTIMIZER["eps"]
    frozen: tuple[str, ...] = ()
    adapters: bool = False
    dtype: str = "float32"

    def load(self, folder: Path, **options: Any) -> Any:
        """Return the model in *folder*, loaded with *options*, its ``frozen`` parameters so, and with ``adapters``."""
        dtype = getattr(torch, self.dtype)
        model = SPECIMENS[self.specimen].load.from_pretrained(folder, dtype=dtype, **options)
        self.freeze(model)
        return adapted(model, self.specimen, options.get("distributed_setup")) if self.adapters else model

    def trained(self, named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Return those of the *named* parameters that are compared: all, or the adapters."""
        return {name: tensor for name, tensor in named if tensor.requires_grad or not self.adapters}

    @property
    def optimizer(self) -> dict[str, Any]:
        """The options of AdamW."""
        return {"lr": self.lr, "weight_decay": self.weight_decay, "eps": self.eps}

    def freeze(self, model: Any) -> None:
        """Turn off gradients of the ``frozen`` parameters of *model*, sharded or not."""
        for name, parameter in model.named_parameters():
            if name.startswith(self.frozen):
                parameter.requires_grad_(False)

    def batches(self, step: int) -> list[dict[str, Tensor]]:
        """Return the global batches of *step*: ``accumulate`` dicts of tensors with ``rows`` rows."""
        generator = torch.Generator().manual_seed(1000 * self.seed + step)
        make = SPECIMENS[self.specimen].batch
        return [make(self.rows, self.length, generator) for _ in range(self.accumulate)]


@attrs.frozen(kw_only=True)
class Outcome:
    """The result of a training: losses and norms per step, the first step's gradients, the final parameters."""

    losses: Sequence[float]
    norms: Sequence[float]
    gradients: Mapping[str, Tensor]
    parameters: Mapping[str, Tensor]


@lru_cache(maxsize=32)
def checkpoint(specimen: str, seed: int = 0) -> Path:
    """Return a folder with the seeded weights of *specimen*, written once by ``save_pretrained``; it goes at exit."""
    folder = scratch(specimen)
    SPECIMENS[specimen].make(seed).save_pretrained(folder)
    return folder


@lru_cache(maxsize=64)
def reference(task: Task) -> Outcome:
    """Return the result of one process on the whole batch, with plain transformers and torch."""
    model = task.load(checkpoint(task.specimen, task.seed))
    optimizer = torch.optim.AdamW(model.parameters(), **task.optimizer)
    losses, norms, gradients = [], [], {}
    for step in range(task.steps):
        batches = task.batches(step)
        joined = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        loss = model(**joined).loss
        loss.backward()
        if step == 0:
            gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    parameters = {name: one.detach() for name, one in task.trained(model.named_parameters()).items()}
    return Outcome(losses=losses, norms=norms, gradients=gradients, parameters=parameters)


def train_on_rank(task: Task, folder: Path, options: Mapping[str, Any]) -> Outcome:
    """Build the setup from *options*, load, train, and return this rank's result; called on every rank."""
    setup = DistributedSetup.build(**options)
    return train(task, setup, task.load(folder, distributed_setup=setup))


def train(task: Task, setup: DistributedSetup, model: Any) -> Outcome:
    """Train *model*, which was loaded for *setup*, and return this rank's result; called on every rank."""
    task.freeze(model)
    return train_with(task, setup.runtime(model))


def train_with(task: Task, runtime: Runtime) -> Outcome:
    """Train the model of *runtime* and return this rank's result; called on every rank."""
    optimizer = runtime.optimizer(torch.optim.AdamW, **task.optimizer)
    # Adapters are whole on every rank, and no plugin has a layout of its own for them.
    wholes = _wholes if task.adapters else partial(whole_state, runtime)
    losses, norms, gradients = [], [], {}
    for step in range(task.steps):
        batches = [rows_of_rank(batch, runtime) for batch in task.batches(step)]
        losses.append(runtime.forward_backward(batches if task.accumulate > 1 else batches[0]).item())
        if step == 0:
            gradients = wholes({n: p.grad for n, p in runtime.named_parameters() if p.grad is not None})
        norms.append(runtime.clip_grad_norm_(MAX_NORM).item())
        optimizer.step()
        optimizer.zero_grad()
    parameters = wholes(task.trained(runtime.named_parameters()))
    return Outcome(losses=losses, norms=norms, gradients=gradients, parameters=parameters)


def trained(pool: Any, task: Task, **options: Any) -> Outcome:
    """Train *task* on the ranks of *pool* under ``DistributedSetup.build(**options)`` and merge what the ranks report.

    Raises AssertionError when replicas on different ranks are not bit-equal, or ranks report different losses or norms.
    """
    return merged(pool.run(train_on_rank, task, checkpoint(task.specimen, task.seed), options))


def merged(outcomes: Sequence[Outcome]) -> Outcome:
    """Merge the results of all ranks; raise AssertionError where a value on two ranks is not bit-equal."""
    for field in ("losses", "norms"):
        values = [getattr(outcome, field) for outcome in outcomes]
        assert all(value == values[0] for value in values), f"{field} differ between ranks: {values}"
    joined: dict[str, dict[str, Tensor]] = {"gradients": {}, "parameters": {}}
    for rank, outcome in enumerate(outcomes):
        for field, tensors in joined.items():
            for name, tensor in getattr(outcome, field).items():
                same = torch.equal(tensors.setdefault(name, tensor), tensor)
                assert same, f"{field}: {name} on rank {rank} is not bit-equal to that of an earlier rank"
    return Outcome(losses=outcomes[0].losses, norms=outcomes[0].norms, **joined)


def mean_of_replicas(outcomes: Sequence[Outcome]) -> Outcome:
    """Merge the results of ranks whose replicas differ by design: the mean of each number, over the ranks that have it.

    Raises AssertionError where a loss differs between ranks: that of a step is one number for all.
    """
    losses = [outcome.losses for outcome in outcomes]
    assert all(value == losses[0] for value in losses), f"losses differ between ranks: {losses}"
    norms = [sum(values) / len(values) for values in zip(*(outcome.norms for outcome in outcomes), strict=True)]
    merged_tensors = [
        {
            name: torch.stack([found[name] for found in tensors if name in found]).mean(0)
            for name in {name: None for found in tensors for name in found}
        }
        for tensors in ([one.gradients for one in outcomes], [one.parameters for one in outcomes])
    ]
    return Outcome(losses=losses[0], norms=norms, gradients=merged_tensors[0], parameters=merged_tensors[1])


def differences(
    found: Outcome, expected: Outcome, tolerance: float = TOLERANCE, other: Outcome | None = None
) -> list[str]:
    """Return a line for each difference of *found* from *expected* above *tolerance*, relative to the expected norm.

    ``other`` is the expected outcome rounded otherwise, as in float64: what rounding explains is no difference then,
    where that is at most a hundredth.
    """
    lines = []
    for field in ("losses", "norms"):
        values, roundings = getattr(expected, field), getattr(other or expected, field)
        for step, (a, b, c) in enumerate(zip(getattr(found, field), values, roundings, strict=True)):
            if not abs(a - b) <= max(tolerance * abs(b), min(FACTOR * abs(c - b), MOST * abs(b))):
                lines.append(f"{field}[{step}]: {a!r}, expected {b!r}")
    for field in ("gradients", "parameters"):
        roundings = getattr(other, field) if other is not None else {}
        lines += tensor_differences(field, getattr(found, field), getattr(expected, field), tolerance, roundings)
    return lines


def tensor_differences(
    field: str,
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    tolerance: float,
    other: Mapping[str, Tensor] = MappingProxyType({}),
) -> list[str]:
    """Return a line for each tensor of *found* that differs from that in *expected*, or that only one of them has."""
    missing = sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    lines = [f"{field}: missing {missing}"] * bool(missing) + [f"{field}: unexpected {extra}"] * bool(extra)
    # A tensor that is zero in exact arithmetic has only noise as its norm: compare with the largest tensor instead.
    floor = max((tensor.norm().item() for tensor in expected.values()), default=0.0) * 1e-3 or 1e-30
    for name in sorted(expected.keys() & found.keys()):
        a, b = found[name].double(), expected[name].double()
        if a.shape != b.shape:
            lines.append(f"{field}: {name} has shape {tuple(a.shape)}, expected {tuple(b.shape)}")
            continue
        error = _relative(a, b, floor)
        if not error <= tolerance and not error <= min(FACTOR * _rounding(name, expected, other, floor), MOST):
            lines.append(f"{field}: {name} is off by {error:.2e} of its norm {b.norm():.3e}")
    return lines


def _relative(a: Tensor, b: Tensor, floor: float) -> float:
    return float((a.double() - b.double()).norm() / max(b.norm().item(), floor))


def _rounding(name: str, expected: Mapping[str, Tensor], other: Mapping[str, Tensor], floor: float) -> float:
    """Return how far rounding brought *name*; a few numbers may be right by luck, so for them it is the most of any."""
    names = [name] if expected[name].numel() >= _FEW else expected
    return max((_relative(other[one], expected[one], floor) for one in names if one in other), default=0.0)


def assert_equivalent(pool: Any, task: Task, **options: Any) -> None:
    """Assert that training *task* under ``DistributedSetup.build(**options)`` gives the result of one process."""
    found = differences(trained(pool, task, **options), reference(task))
    assert not found, "not what one process computes:\n" + "\n".join(found)


def _wholes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: whole(tensor) for name, tensor in state.items()}


def whole_state(runtime: Runtime, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the whole tensors of *state*, by way of the canonical state, as a strategy may have its own layout."""
    runtime.sharded.calls.export_state(state=state, parts=list(runtime.parts), mesh=runtime.mesh)
    return {name: whole(tensor) for name, tensor in state.items()}
