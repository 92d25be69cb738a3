"""Train and evaluate a model that is split into pipeline stages."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from types import FrameType
from typing import TYPE_CHECKING, Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_dist.hf_model import class_name, inner_model, name_root
from nemo_dist.plugin.hookspecs import Batch
from nemo_dist.plugin.resharding import keep_gathered, reshard
from nemo_dist.training.router_aux_loss import COUNTED
from nemo_dist.training.step_loss import READS, ModelLoss, OwnLoss, at_least_something
from nemo_dist.training.whole_rows import Outputs
from nemo_dist_pipeline.partition.stage_model import PipelineInfo, StageInfo, set_hollow_dtype
from nemo_dist_pipeline.runtime.adapted_stages import replace_parts
from nemo_dist_pipeline.runtime.forward_only import broadcast_tensors, forward_only
from nemo_dist_pipeline.runtime.loss import MeanOfLabels
from nemo_dist_pipeline.runtime.microbatches import Microbatches, MicrobatchSplitter, by_rows
from nemo_dist_pipeline.runtime.running import running
from nemo_dist_pipeline.runtime.tied_embedding import TiedWeight, gradients_set_aside
from nemo_dist_pipeline.runtime.torch_stage import (
    ModelStage,
    ScheduleBuilder,
    TorchSchedule,
    run_part,
    torch_order,
)
from nemo_dist_pipeline.schedule.actions import Order
from nemo_dist_pipeline.schedule.stage_placement import StagePlacement
from nemo_dist_pipeline.schedule.visualize import picture, summary

if TYPE_CHECKING:
    from nemo_dist_pipeline.config import PipelineConfig

_CLIPPING = inspect.unwrap(torch.nn.utils.clip_grad_norm_).__code__
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@attrs.define(kw_only=True, eq=False, slots=False)
class AutoPipeline:
    """A model in stages over the pipeline ranks; the loaders return one when ``pp_size > 1``.

    ``parts`` are the stages of this rank: transformers models, whose parameters have their names in the full model.
    Every pipeline rank passes the same batch. With a runtime, ``runtime.forward_backward(batch)`` does all of it; for a
    loop of your own there are :meth:`step`, :meth:`eval` and :meth:`schedule`. What asks for modules or parameters
    (``state_dict``, ``modules``, ``train``) is answered for the stages of this rank; ``save_pretrained`` writes all.
    """

    parts: list[nn.Module]
    config: PipelineConfig
    placement: StagePlacement
    group: dist.ProcessGroup
    device: torch.device
    cp_size: int = 1
    tied: TiedWeight | None = None
    needs_loss: str = ""  # why the model's own loss cannot be computed by stages
    _dtype: torch.dtype | None = None
    _built: OrderedDict[Any, TorchSchedule] = attrs.field(factory=OrderedDict)

    @property
    def info(self) -> PipelineInfo:
        """The stages of this rank."""
        stages = self._stages
        return PipelineInfo(
            schedule=self.placement.name,
            stages=stages,
            model_parts=tuple(self.parts),
            num_stages=stages[0].count,
            pp_rank=dist.get_rank(self.group),
            pp_size=dist.get_world_size(self.group),
        )

    @property
    def _stages(self) -> tuple[StageInfo, ...]:
        return tuple(part.pipeline_stage for part in self.parts)  # type: ignore[misc]

    @property
    def _models(self) -> list[nn.Module]:
        """The stages themselves, which adapters of PEFT wrap."""
        return [inner_model(part) for part in self.parts]

    @property
    def _splitter(self) -> MicrobatchSplitter:
        hidden = self._stages[0].hidden_shape
        return MicrobatchSplitter(config=self.config, placement=self.placement, cp_size=self.cp_size, hidden=hidden)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters of this rank's stages under their names in the full model."""
        reshard(self.parts)
        for part in self.parts:
            yield from part.named_parameters()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of this rank's stages.

        A norm of their gradients is one of these stages only, so ``runtime.clip_grad_norm_`` clips, and torch's
        ``clip_grad_norm_`` is refused here. It is not seen where it gets a list of them, or those of one of ``parts``.
        """
        frame = inspect.currentframe()
        refuse_norm_of_stages(frame.f_back if frame is not None else None)
        for _, parameter in self.named_parameters():
            yield parameter

    def modules(self) -> Iterator[nn.Module]:
        """Yield the modules of this rank's stages."""
        for _, module in self.named_modules():
            yield module

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the modules of this rank's stages under their names in the full model."""
        for part in self.parts:
            yield from part.named_modules()

    def state_dict(self) -> dict[str, Any]:
        """Return the parameters and buffers of this rank's stages under their names in the full model.

        ``runtime.save`` and ``runtime.export`` write those of all ranks.
        """
        reshard(self.parts)
        return {name: value for part in self.parts for name, value in part.state_dict().items()}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of this rank's stages."""
        for part in self.parts:
            part.zero_grad(set_to_none)

    def requires_grad_(self, requires_grad: bool = True) -> AutoPipeline:
        """Train the parameters of this rank's stages, or, with False, freeze them."""
        for part in self.parts:
            part.requires_grad_(requires_grad)
        return self

    @property
    def training(self) -> bool:
        """Whether this rank's stages are in training mode."""
        return all(part.training for part in self.parts)

    def __call__(self, **batch: Any) -> Outputs:
        """Return the outputs of a model that is called with *batch*, equal on all stages: for use without gradients.

        With ``labels``, which only the loss reads, they have the mean ``loss``. Raises ValueError where gradients are
        on: a pipeline runs forward and backward together.
        """
        if torch.is_grad_enabled():
            raise ValueError(
                "the stages of a pipeline run forward and backward together: train with "
                "runtime.forward_backward(batch), or call the pipeline within torch.no_grad() for its outputs alone"
            )
        found = self.forward(batch)
        return Outputs(({"loss": self._mean(batch)} if batch.get("labels") is not None else {}) | found)

    def generate(self, *_: Any, **__: Any) -> Any:
        """Raise NotImplementedError that says how to generate."""
        raise NotImplementedError(
            f"{class_name(self._models[0])} is split into stages, which do not generate; runtime.export(folder) writes "
            "a folder for transformers, or load it with pp_size=1 (fsdp2 and tp generate)"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise AttributeError(
            f"AutoPipeline has no {name!r}: it stands for the stages of a model, which no rank has whole; "
            "pipeline.parts are the stages of this rank, transformers models"
        )

    def train(self, mode: bool = True) -> AutoPipeline:
        """Set all stages of this rank to training mode (dropout and the like), or, with False, out of it."""
        for part in self.parts:
            part.train(mode)
        return self

    # ---- adapters ----

    def replace_parts(self, make: Callable[[nn.Module], nn.Module]) -> None:
        """Put what *make* makes of a stage in place of it, such as its wrapper in PEFT; *make* sees no other stage.

        Stages follow one another, each with the random generator that the one before left, so that draws are those for
        the whole model. Every pipeline rank calls it. Raises ValueError where *make* replaces a tied module.
        """
        replace_parts(self.parts, self.placement, self.group, self.device, make)

    # ---- training ----

    def step(self, batch: Batch, weight: Tensor | float = 1.0) -> Tensor:
        """Run forward and backward of ``weight`` times the mean loss of *batch*; return that, equal on all stages.

        *batch* is a mapping of tensors with ``labels``, the same on every pipeline rank. Gradients are accumulated; a
        data-parallel strategy has averaged them. ``runtime.forward_backward`` weighs by the labels of all
        ranks, which this does not. Raises ValueError for a model with adapters, which only a runtime averages.
        """
        if any(name_root(part) is not inner_model(part) for part in self.parts):
            raise ValueError(
                "a pipeline with adapters is trained by runtime.forward_backward(batch), which averages them"
            )
        weights = torch.as_tensor(weight, dtype=torch.float32, device=self.device)
        if (loss := self._loss_of_config) is None:
            return self.run([batch], [weights])
        batch = loss.model_inputs(batch) | loss.reads(batch)
        count: Any = loss.count(batch)
        return self.run([batch], [weights / at_least_something(count.to(self.device))], loss)

    @cached_property  # one object, as torch's schedules are kept by their loss
    def _loss_of_config(self) -> OwnLoss | None:
        found = self.mean_loss
        return None if found is None else OwnLoss(function=found, model=inner_model(self.parts[-1]))

    @cached_property
    def mean_loss(self) -> MeanOfLabels | None:
        """The loss that the config asks for, if it does, as a runtime takes one."""
        given = self.config.loss_fn
        return None if given is None else MeanOfLabels(given, inner_model(self.parts[-1]))

    def run(self, batches: Sequence[Batch], weights: Sequence[Tensor], loss: Any = None) -> Tensor:
        """Run forward and backward of ``sum(weight * mean loss)``; return it: 0-dim float32, equal on all stages.

        With a *loss*, which makes a sum of outputs and a batch, of ``sum(weight * sum)``. The batches run through the
        schedule together where their shapes, and the schedule's memory, allow.
        """
        self._judge(loss)
        runs = [self._splitter.split(self._models[-1], *given, loss) for given in zip(batches, weights, strict=True)]
        total = torch.zeros((), device=self.device)
        with keep_gathered(self.parts), gradients_set_aside(self.tied.replicas) if self.tied else nullcontext():
            for run in self._splitter.joined(runs):
                total += self._train(run, loss)
            if self.tied:
                self.tied.sum_gradients()
        dist.all_reduce(total, group=self.group)  # all pipeline ranks; only the last stage adds a loss, the others 0
        return total

    def _judge(self, loss: Any) -> None:
        """Raise ValueError where *loss*, None or that of the model, is one that stages do not compute."""
        if self.needs_loss and not isinstance(loss, OwnLoss):
            raise ValueError(self.needs_loss)

    def survey(self, batches: Sequence[Batch]) -> None:
        """Run the forwards that :meth:`run` would run, without gradients, in the mode that the stages are in.

        A loss of the user's own reads the labels itself, so that the batches have none.
        """
        for batch in batches:
            self._run_forward(Microbatches.without_loss(batch, self._size, self._splitter.minimum))

    def measure(self, batches: Sequence[Batch], loss: Any) -> Tensor:
        """Return the total sum and count of *loss*, float64 (2,), equal on all stages; forwards without gradients."""
        self._judge(loss)
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        one = torch.ones((), device=self.device)
        for batch in batches:
            run = Microbatches.of(self._models[-1], batch, one, self._size, 0, loss)
            for found in self._run_forward(run, loss):
                total += torch.stack(found).double()
        dist.all_reduce(total, group=self.group)  # all pipeline ranks, as in run()
        return total

    def _train(self, run: Microbatches, loss: Any) -> Tensor:
        losses: list[Tensor] = []
        scaled = self.config.scale_grads_in_schedule
        target = run.weights * run.count if scaled else run.weights
        # The schedule divides all of a gradient at its end, so earlier batches must not be in it yet.
        with gradients_set_aside(list(self.parameters())) if scaled else nullcontext(), running(self):
            self.schedule(run, loss).step(target=target, losses=losses, return_outputs=False, **run.arguments)
        total = torch.stack([loss.detach().float() for loss in losses]).sum() if losses else run.weights.new_zeros(())
        return total / run.count if scaled else total

    def schedule(self, run: Microbatches, loss: Any = None) -> TorchSchedule:
        """Return torch's schedule for the shapes of *run*; call its ``step(target=run.weights, **run.arguments)``."""
        key = run.shape, id(loss)
        if key not in self._built:
            while len(self._built) >= self.config.pp_cached_schedules:  # before new buffers are made
                self._built.popitem(last=False)
            hidden = torch.empty(self._splitter.hidden_shape(run), dtype=self._boundary_dtype(run), device=self.device)
            stages = [
                ModelStage(part, stage, hidden, self.group, loss)
                for part, stage in zip(self._models, self._stages, strict=True)
            ]
            self._built[key] = self._builder(stages, run.count)
        self._built.move_to_end(key)
        return self._built[key]

    @property
    def _builder(self) -> ScheduleBuilder:
        return ScheduleBuilder(
            schedule=self.placement.schedule,
            csv=self.config.pp_schedule_csv,
            scale_grads=self.config.scale_grads_in_schedule,
        )

    def _boundary_dtype(self, run: Microbatches) -> torch.dtype:
        """Return the dtype of the hidden states between stages: the user's, else what the first stage makes."""
        if self._dtype is None:
            codes = torch.zeros(2, dtype=torch.long, device=self.device)
            entry: Any = self._models[0].pipeline_entry
            if self._stages[0].is_first:
                made = self._first_hidden(run).dtype
                codes += torch.tensor([_DTYPES.index(made), _DTYPES.index(entry.dtype)], device=self.device)
            # All ranks of this pipeline take part; the rank of the first stage knows the dtypes.
            dist.broadcast(codes, group_src=self.placement.rank_of(0), group=self.group)
            made, embedded = (_DTYPES[code] for code in codes.tolist())
            for part in self._models:
                set_hollow_dtype(part, embedded)
                entry = part.pipeline_entry
                entry.made = made
            self._dtype = getattr(torch, self.config.dtype) if self.config.dtype is not None else made
        return self._dtype

    @torch.no_grad()
    def _first_hidden(self, run: Microbatches) -> Tensor:
        devices = [self.device] if self.device.type == "cuda" else []  # None would mean all of the machine
        with torch.random.fork_rng(devices), _mode(self.parts, False):
            # This forward belongs to no step, so the router statistics must not count its tokens.
            inputs = {name: value for name, value in run[0].items() if name != COUNTED and not name.startswith(READS)}
            hidden: Tensor = run_part(self._models[0], self._stages[0], None, inputs, None)
        if hidden.shape != self._splitter.hidden_shape(run):
            raise ValueError(
                f"the first stage makes hidden states of shape {tuple(hidden.shape)} of inputs that should give "
                f"{self._splitter.hidden_shape(run)}; sequence-sharded activations do not travel between stages"
            )
        return hidden

    # ---- evaluation ----

    def eval(self, batch: Batch | None = None) -> Any:
        """Set all stages of this rank to evaluation mode, as of a module; or evaluate *batch*, if one is given.

        Then return its mean loss without gradients and dropout, 0-dim float32, equal on all stages; the mode stays.
        """
        if batch is None:
            return self.train(False)
        with _mode(self.parts, False):
            return self._mean(batch)

    def _mean(self, batch: Batch) -> Tensor:
        loss = self._loss_of_config or ModelLoss(inner_model(self.parts[-1]))
        total, count = self.measure([loss.model_inputs(batch) | loss.reads(batch)], loss)
        mean: Tensor = (total / at_least_something(count)).float()
        return mean

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the outputs for *batch* by name, one row per row, equal on all stages; without gradients."""
        outputs = self._run_forward(self._rowwise(batch))
        first = outputs[0] if outputs else {}
        named = [name for name, value in first.items() if isinstance(value, Tensor) and value.ndim]
        found = {name: torch.cat([output[name] for output in outputs]) for name in named}
        count = self._stages[0].count
        source = self.placement.rank_of(count - 1, count)
        return broadcast_tensors(found, source, self.group, self.device)

    def logits(self, batch: Batch) -> Tensor | None:
        """Return the logits of *batch*, one row per row, on the ranks with the last stage; None on the others.

        Every pipeline rank calls it. Labels are not needed.
        """
        with _mode(self.parts, False):
            outputs = self._run_forward(self._rowwise(batch))
        return torch.cat([output.logits for output in outputs]) if self.info.has_last_stage else None

    @staticmethod
    def _without_labels(batch: Batch) -> dict[str, Any]:
        return {name: value for name, value in batch.items() if name not in ("labels", "shift_labels")}

    def _rowwise(self, batch: Batch) -> Microbatches:
        """Return the microbatches of *batch* without labels, of the largest size that divides its rows."""
        inputs, rows = by_rows(self._without_labels(batch))
        size = next(size for size in range(self._size, 0, -1) if rows % size == 0)
        return Microbatches(inputs, torch.empty(0), rows // size, rows)

    @property
    def _size(self) -> int:
        return self.config.pp_microbatch_size

    @torch.no_grad()
    def _run_forward(self, run: Microbatches, loss: Any = None) -> list[Any]:
        with running(self):
            return self._forwards(run, loss)

    def _forwards(self, run: Microbatches, loss: Any) -> list[Any]:
        hidden = torch.empty(self._splitter.hidden_shape(run), dtype=self._boundary_dtype(run), device=self.device)
        with keep_gathered(self.parts):
            return forward_only(self._models, self._stages, run, hidden, self.placement, self.group, loss)

    # ---- inspection ----

    def order(self, microbatches: int | None = None) -> Order:
        """Return what every rank does, in order, with *microbatches* (by default those of the config, or 8)."""
        if self.placement.schedule is None:
            return self.placement.order
        count = microbatches or self.config.microbatches or 8
        per_rank = len(self.parts)
        return torch_order(self.placement.schedule, dist.get_world_size(self.group), per_rank, count)

    def debug_summary(self) -> str:
        """Return a table of the stages: rank, modules and parameters, and the schedule with its theoretical bubble."""
        return summary(self._stages[0].division, self.placement, self.parts, self.order())

    def picture(self, microbatches: int | None = None, form: str = "text") -> str:
        """Return a picture of the schedule: one row per rank, time to the right, as ``"text"`` or ``"svg"``."""
        return picture(self.order(microbatches), form)


def refuse_norm_of_stages(caller: FrameType | None) -> None:
    """Raise ValueError where the *caller*, which takes the parameters of stages, is torch's ``clip_grad_norm_``."""
    if caller is not None and caller.f_code is _CLIPPING:
        raise ValueError(
            "torch.nn.utils.clip_grad_norm_ would clip the stages of every pipeline rank by a norm of their own; call "
            "runtime.clip_grad_norm_(max_norm), which clips by that of the whole model"
        )


@contextmanager
def _mode(parts: Sequence[nn.Module], training: bool) -> Iterator[None]:
    """Within the context, set *parts* to training or evaluation mode."""
    before = [part.training for part in parts]
    for part in parts:
        part.train(training)
    try:
        yield
    finally:
        for part, mode in zip(parts, before, strict=True):
            part.train(mode)
