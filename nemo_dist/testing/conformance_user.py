"""What the conformance kit runs on every rank for what is the user's: batches, modes, groups of options, runtimes."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import attrs
import numpy
import torch
from torch import Tensor, nn

from nemo_dist.setup.setup import DistributedSetup
from nemo_dist.testing.conformance_runs import has_own_loop, loaded, started
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
    """Return what loading, a runtime, a step and an evaluation change that is the user's, in either mode.

    That is the batch, random generators, and the mode of modules: as transformers loads them, and after ``train()``.
    """
    _ = torch.rand(1), random.random(), numpy.random.random()  # so that a seed anew is seen
    before = _Generators.now()
    plain = task.load(folder)
    expected = _Generators.now()
    modes = {name: module.training for name, module in plain.named_modules()}
    before.put_back()
    setup, model = loaded(task, folder, build)
    lines = [f"{line}, in loading" for line in expected.changed(_modules(model), modes)]
    quiet = _draws_nothing(plain.train(), task)
    for training in (False, True):
        model.train(training)
        modes = dict.fromkeys(_modules(model), training)
        generators = _Generators.now()
        batch_lines = _step_of_user(task, setup, model)
        changed = generators.changed(_modules(model), modes, drawing=training and not quiet)
        mode = "training" if training else "evaluation"
        lines += [f"{line}, in a step in {mode} mode" for line in (*batch_lines, *changed)]
    return lines


def _step_of_user(task: Task, setup: DistributedSetup, model: Any) -> list[str]:
    """Take a step, and evaluate; return what that changed of the batch."""
    runtime = setup.runtime(model)
    optimizer = runtime.optimizer(torch.optim.AdamW, **task.optimizer)
    batch = rows_of_rank(task.batches(0)[0], runtime)
    kept = {name: value.clone() for name, value in batch.items()}
    runtime.forward_backward(batch)
    optimizer.step()
    optimizer.zero_grad()
    runtime.evaluate([batch])
    runtime.close()
    changed = [name for name in {**kept, **batch} if not (name in batch and _same(kept, batch, name))]
    return [f"{name} of the batch that it was given" for name in changed]


def _modules(model: Any) -> dict[str, nn.Module]:
    return {name: module for part in getattr(model, "parts", [model]) for name, module in part.named_modules()}


def _draws_nothing(model: Any, task: Task) -> bool:
    """Whether plain transformers draws no random number in a forward in training mode, as it does for dropout."""
    before = _Generators.now()
    with torch.no_grad():
        model(**task.batches(0)[0])
    return not before.changed({}, {})


@attrs.frozen(eq=False)
class _Generators:
    """The states of the user's random generators."""

    torch: Tensor
    python: Any
    numpy: Any

    @classmethod
    def now(cls) -> _Generators:
        return cls(torch.get_rng_state(), random.getstate(), numpy.random.get_state())

    def put_back(self) -> None:
        torch.set_rng_state(self.torch)
        random.setstate(self.python)
        numpy.random.set_state(self.numpy)

    def changed(self, modules: Mapping[str, nn.Module], modes: Mapping[str, bool], drawing: bool = False) -> list[str]:
        """Return which generators are not in this state, but for *drawing*, and which *modules* are not in *modes*."""
        now = _Generators.now()
        same = {
            "torch's random generator": torch.equal(self.torch, now.torch),
            "Python's random generator": self.python == now.python,
            "NumPy's random generator": all(map(numpy.array_equal, self.numpy, now.numpy)),
        }
        lines = [] if drawing else [name for name, is_same in same.items() if not is_same]
        return lines + [
            f"training of module {name!r}"
            for name, module in modules.items()
            if name in modes and module.training != modes[name]
        ]


Compared = dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]  # what is compared: as found, and as expected


def on_rank_waiting(task: Task, folder: Path, build: Mapping[str, Any]) -> Compared | None:
    """Return what a drop and a step of gradients that wait give, each with what it is to give; a refusal gives nothing.

    None for a model that a plugin runs by an engine of its own.
    """
    runtime, optimizer = started(task, folder, build)
    if not has_own_loop(runtime):
        return None
    first, second = (runtime.batch(rows_of_rank(task.batches(step)[0], runtime)) for step in range(2))
    runtime.model(**second).loss.backward()
    expected = _gradients(runtime)
    optimizer.zero_grad()
    with runtime.no_sync():
        runtime.model(**first).loss.backward()
    optimizer.zero_grad()
    runtime.model(**second).loss.backward()
    found: Compared = {"gradients after a drop": (_gradients(runtime), expected)}
    runtime.close()
    stepped = [_stepped(task, folder, build, waiting) for waiting in (True, False)]
    if stepped[0] is not None and stepped[1] is not None:
        found["parameters after a step"] = (stepped[0], stepped[1])
    return found


def _gradients(runtime: Any) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in runtime.named_parameters() if p.grad is not None}
    return {name: tensor.clone() for name, tensor in whole_state(runtime, found).items()}


def _stepped(task: Task, folder: Path, build: Mapping[str, Any], waiting: bool) -> dict[str, Tensor] | None:
    """Return the parameters after a step, of gradients that are *waiting* to be reduced or not; None if refused."""
    runtime, optimizer = started(task, folder, build)
    with runtime, runtime.no_sync() if waiting else nullcontext():
        runtime.model(**runtime.batch(rows_of_rank(task.batches(0)[0], runtime))).loss.backward()
        try:
            optimizer.step()
        except RuntimeError:
            if not waiting:
                raise
            return None
        return whole_state(runtime, dict(runtime.named_parameters()))


# Options that are not the defaults, for what an optimizer that a plugin makes anew may lose.
OPTIMIZERS: Mapping[str, tuple[Any, Mapping[str, Any]]] = {
    "AdamW": (torch.optim.AdamW, {"betas": (0.7, 0.95)}),
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
}


def on_rank_groups(task: Task, folder: Path, build: Mapping[str, Any]) -> dict[str, dict[str, Tensor] | str]:
    """Train vectors and the others in groups of other options, which change after a step; return the parameters.

    That is done with each of ``OPTIMIZERS``, by name; in place of the parameters is what refuses one of them.
    """
    found: dict[str, dict[str, Tensor] | str] = {}
    for name, (kind, _) in OPTIMIZERS.items():
        setup, model = loaded(task, folder, build)
        with setup.runtime(model) as runtime:
            try:
                optimizer = runtime.optimizer(kind, _groups(runtime.named_parameters()), **_options(task, name))
            except (ValueError, NotImplementedError) as refusal:
                found[name] = str(refusal)
                continue
            for step in range(task.steps):
                runtime.forward_backward(rows_of_rank(task.batches(step)[0], runtime))
                optimizer.step()
                optimizer.zero_grad()
                _slow_down(optimizer)
            found[name] = whole_state(runtime, dict(runtime.named_parameters()))
    return found


def plain_groups(task: Task, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Return what ``on_rank_groups`` gives on one process, with plain transformers and torch."""
    found = {}
    for name, (kind, _) in OPTIMIZERS.items():
        model = task.load(folder)
        optimizer = kind(_groups(model.named_parameters()), **_options(task, name))
        for step in range(task.steps):
            model(**task.batches(step)[0]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            _slow_down(optimizer)
        found[name] = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return found


def _options(task: Task, name: str) -> dict[str, Any]:
    """Return the options of the optimizer *name*: those of *task*, as far as it has them, and its own."""
    kind, own = OPTIMIZERS[name]
    known = inspect.signature(kind).parameters
    return {option: value for option, value in task.optimizer.items() if option in known} | dict(own)


def _groups(named: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    trained = [parameter for _, parameter in named if parameter.requires_grad]
    vectors = [parameter for parameter in trained if parameter.ndim == 1]  # norms and biases, whatever their names
    others = [parameter for parameter in trained if parameter.ndim != 1]
    return [{"params": others}, {"params": vectors, "lr": 2e-2, "weight_decay": 0.0}]


def _slow_down(optimizer: Any) -> None:
    """Change the learning rates as a scheduler does."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] / 2
