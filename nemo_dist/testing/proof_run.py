"""Run the same training steps on one process and on ranks, for ``verify``: forward, backward, clip, step, reload."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

import nemo_dist
from nemo_dist.checkpoint.state_dict import own_state
from nemo_dist.errors import CheckpointError, NemoDistError
from nemo_dist.hf_model import inner_model, name_root
from nemo_dist.setup.setup import DistributedSetup
from nemo_dist.testing.equivalence import MAX_NORM, OPTIMIZER, whole_state
from nemo_dist.testing.tensors import rows_of_rank
from nemo_dist.testing.trace import Trace
from nemo_dist.training.runtime import Runtime

Batch = Mapping[str, Tensor]
# Entered on every rank around all that runs there: a fault to plant, a patch, a profiler.
Around = Callable[[], AbstractContextManager[Any]]

STEPS = 3  # before the state is saved; one more follows after it is loaded again


@attrs.frozen(kw_only=True)
class Work:
    """What is run: the ``loader`` class by name, the ``folder`` with the weights, and the global batches of each step.

    ``traced`` is the number of the step whose modules are recorded; nothing is run after it. None records nothing.
    """

    loader: str
    folder: Path
    batches: Sequence[Sequence[Batch]]
    traced: int | None = None

    @property
    def load(self) -> Any:
        """The ``NeMoAutoModelFor*`` class."""
        return getattr(nemo_dist, self.loader)

    @property
    def steps(self) -> range:
        """The steps to run."""
        return range(len(self.batches) if self.traced is None else self.traced + 1)


@attrs.define(kw_only=True, eq=False)
class Result:
    """What one process, or one rank, computed.

    ``loaded`` are the parameters and persistent buffers before the first step, ``parameters`` those after each step,
    and ``gradients`` those of each step, whole and by name. ``tokens``, with ``traces``, are the
    numbers of the tokens that this rank computed on. ``refused``: why there is nothing else; ``unsaved``: why the run
    went on without a save and a load in between; ``unexported``: why there is no export.
    """

    loaded: dict[str, Tensor] = attrs.field(factory=dict)
    losses: list[float] = attrs.field(factory=list)
    norms: list[float] = attrs.field(factory=list)
    gradients: list[dict[str, Tensor]] = attrs.field(factory=list)
    parameters: list[dict[str, Tensor]] = attrs.field(factory=list)
    traces: list[Trace] = attrs.field(factory=list)
    tokens: Tensor | None = None
    refused: str | None = None
    unsaved: str | None = None
    unexported: str | None = None


def run_alone(work: Work, dtype: torch.dtype = torch.float32, nudged: bool = False) -> Result:
    """Run *work* on this process with plain transformers and torch, in *dtype*.

    With *nudged* the last bit of every weight is changed at random: that shows, too, what rounding can do.
    """
    model = work.load.auto.from_pretrained(work.folder, dtype=torch.float32).to(dtype)
    if nudged:
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + torch.finfo(dtype).eps * torch.randn_like(parameter).sign())
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIMIZER)
    result = Result(loaded=tensors_of(model))
    for step in work.steps:
        batch = {n: v.to(dtype) if v.is_floating_point() else v for n, v in joined(work.batches[step]).items()}
        with _tracing(result, [model]) if step == work.traced else nullcontext():
            loss = model(**batch).loss
            loss.backward()
        result.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        result.losses.append(loss.item())
        result.norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).item())
        optimizer.step()
        optimizer.zero_grad()
        result.parameters.append(tensors_of(model))
    return result


def tensors_of(model: Any) -> dict[str, Tensor]:
    """Return copies of the parameters of *model*, a tied one once, and of its persistent buffers."""
    found = dict(model.named_parameters())
    persistent = model.state_dict(keep_vars=True)
    found |= {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def run_on_rank(work: Work, keywords: Mapping[str, Any], out: Path, around: Around | None) -> Result:
    """Run *work* on this rank under ``DistributedSetup.build(**keywords)``; save to, and export into, the folder *out*.

    What refuses the setup or the model ends up in ``refused``.
    """
    with ExitStack() as stack:
        if around is not None:
            stack.enter_context(around())
        run: _RankRun | None = None
        try:
            run = _RankRun.start(work, keywords)
        except (NemoDistError, ValueError, TypeError, NotImplementedError) as error:
            return Result(refused=str(error))
        return run.all(out)


@attrs.define(kw_only=True, eq=False)
class _RankRun:
    work: Work
    keywords: Mapping[str, Any]
    runtime: Runtime
    optimizer: Any
    result: Result = attrs.field(factory=Result)

    @classmethod
    def start(cls, work: Work, keywords: Mapping[str, Any]) -> _RankRun:
        setup = DistributedSetup.build(**keywords)
        model = work.load.from_pretrained(work.folder, distributed_setup=setup, dtype=torch.float32)
        runtime = setup.runtime(model, check_replicas=0)  # replicas that differ are for the comparison to report
        optimizer = runtime.optimizer(torch.optim.AdamW, **OPTIMIZER)
        return cls(work=work, keywords=keywords, runtime=runtime, optimizer=optimizer)

    def all(self, out: Path) -> Result:
        self.result.loaded = self._tensors()
        for step in self.work.steps:
            if step == STEPS:
                try:
                    self._reload(out)
                except CheckpointError as error:  # on all ranks alike, such as for copies that differ
                    self.result.unsaved = str(error)
            self._step(step)
        if self.work.traced is None:
            try:
                self.runtime.export(out / "export")
            except NemoDistError as error:  # on all ranks, which is no reason to lose what they computed
                self.result.unexported = str(error)
        self.runtime.close()
        return self.result

    def _step(self, step: int) -> None:
        given = self.work.batches[step]
        rows = [rows_of_rank(batch, self.runtime) for batch in given]
        parts = [inner_model(part) for part in self.runtime.parts]
        if step == self.work.traced:
            self.result.tokens = own_tokens(given, self.runtime)
        with _tracing(self.result, parts) if step == self.work.traced else nullcontext():
            self.result.losses.append(self.runtime.forward_backward(rows if len(rows) > 1 else rows[0]).item())
        gradients = {n: p.grad for n, p in self.runtime.named_parameters() if p.grad is not None}
        self.result.gradients.append(whole_state(self.runtime, gradients))
        self.result.norms.append(self.runtime.clip_grad_norm_(MAX_NORM).item())
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.result.parameters.append(self._tensors())

    def _tensors(self) -> dict[str, Tensor]:
        """Return what ``tensors_of`` returns of the whole model, as far as this rank has it."""
        state: dict[str, Tensor] = dict(self.runtime.named_parameters())
        buffers = {name for part in self.runtime.parts for name, _ in name_root(part).named_buffers()}
        state |= {name: tensor for name, tensor in own_state(self.runtime.sharded).items() if name in buffers}
        return whole_state(self.runtime, state)

    def _reload(self, out: Path) -> None:
        """Save, and continue with a model that was loaded anew."""
        self.runtime.save(out / "checkpoint", self.optimizer)
        self.runtime.close()
        fresh = _RankRun.start(self.work, self.keywords)
        self.runtime, self.optimizer = fresh.runtime, fresh.optimizer
        self.runtime.load(out / "checkpoint", self.optimizer)


def _tracing(result: Result, models: Sequence[Any]) -> AbstractContextManager[Any]:
    stack = ExitStack()
    for model in models:
        trace = Trace()
        result.traces.append(trace)
        stack.enter_context(trace.watching(model))
    return stack


def joined(batches: Sequence[Batch]) -> Batch:
    """Return one batch with the rows of all *batches*."""
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def own_tokens(batches: Sequence[Batch], runtime: Runtime) -> Tensor:
    """Return the numbers of the tokens of the global *batches* that this rank computes on, counted row by row."""
    shape = joined(batches)["input_ids"].shape
    numbers = torch.arange(shape.numel()).reshape(shape).split([len(batch["input_ids"]) for batch in batches])
    own = [
        runtime.batch(rows_of_rank({**batch, "input_ids": count}, runtime))["input_ids"]
        for batch, count in zip(batches, numbers, strict=True)
    ]
    return torch.cat(own).cpu()
