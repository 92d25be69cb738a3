"""Train and evaluate a model that is split into pipeline stages."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_dist.plugin.hookspecs import Batch
from nemo_dist.plugin.resharding import keep_gathered, reshard
from nemo_dist.training.router_aux_loss import COUNTED
from nemo_dist_pipeline.partition.stage_model import PipelineInfo, StageInfo, set_hollow_dtype
from nemo_dist_pipeline.runtime.forward_only import forward_only
from nemo_dist_pipeline.runtime.microbatches import Microbatches, MicrobatchSplitter
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

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@attrs.define(kw_only=True, eq=False)
class AutoPipeline:
    """A model in stages over the pipeline ranks; the loaders return one when ``pp_size > 1``.

    ``parts`` are the stages of this rank: transformers models, whose parameters have their names in the full model.
    Every pipeline rank passes the same batch. With a runtime, ``runtime.forward_backward(batch)`` does all of it; for a
    loop of your own there are :meth:`step`, :meth:`eval` and :meth:`schedule`.
    """

    parts: list[nn.Module]
    config: PipelineConfig
    placement: StagePlacement
    group: dist.ProcessGroup
    device: torch.device
    cp_size: int = 1
    tied: TiedWeight | None = None
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
    def _splitter(self) -> MicrobatchSplitter:
        hidden = self._stages[0].hidden_shape
        return MicrobatchSplitter(config=self.config, placement=self.placement, cp_size=self.cp_size, hidden=hidden)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters of this rank's stages under their names in the full model."""
        reshard(self.parts)
        for part in self.parts:
            yield from part.named_parameters()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of this rank's stages."""
        for _, parameter in self.named_parameters():
            yield parameter

    def train(self, mode: bool = True) -> AutoPipeline:
        """Set all stages of this rank to training mode (dropout and the like), or, with False, out of it."""
        for part in self.parts:
            part.train(mode)
        return self

    # ---- training ----

    def step(self, batch: Batch, weight: Tensor | float = 1.0) -> Tensor:
        """Run forward and backward of ``weight`` times the mean loss of *batch*; return that, equal on all stages.

        *batch* is a mapping of tensors with ``labels``, the same on every pipeline rank. Gradients are accumulated; a
        data-parallel strategy has averaged them. ``runtime.forward_backward`` weighs by the labels of all
        ranks, which this does not.
        """
        return self.run([batch], [torch.as_tensor(weight, dtype=torch.float32, device=self.device)])

    def run(self, batches: Sequence[Batch], weights: Sequence[Tensor]) -> Tensor:
        """Run forward and backward of ``sum(weight * mean loss)``; return it: 0-dim float32, equal on all stages.

        The batches run through the schedule together where their shapes, and the schedule's memory, allow.
        """
        runs = [self._splitter.split(self.parts[-1], *given) for given in zip(batches, weights, strict=True)]
        total = torch.zeros((), device=self.device)
        with keep_gathered(self.parts), gradients_set_aside(self.tied.replicas) if self.tied else nullcontext():
            for run in self._splitter.joined(runs):
                total += self._train(run)
            if self.tied:
                self.tied.sum_gradients()
        dist.all_reduce(total, group=self.group)  # all pipeline ranks; only the last stage adds a loss, the others 0
        return total

    def survey(self, batches: Sequence[Batch]) -> None:
        """Run the forwards that :meth:`run` would run, without gradients, in the mode that the stages are in."""
        for batch in batches:
            self._run_forward(self._splitter.split(self.parts[-1], batch, torch.ones((), device=self.device)))

    def _train(self, run: Microbatches) -> Tensor:
        losses: list[Tensor] = []
        scaled = self.config.scale_grads_in_schedule
        target = run.weights * run.count if scaled else run.weights
        # The schedule divides all of a gradient at its end, so earlier batches must not be in it yet.
        with gradients_set_aside(list(self.parameters())) if scaled else nullcontext():
            self.schedule(run).step(target=target, losses=losses, return_outputs=False, **run.inputs)
        total = torch.stack([loss.detach().float() for loss in losses]).sum() if losses else run.weights.new_zeros(())
        return total / run.count if scaled else total

    def schedule(self, run: Microbatches) -> TorchSchedule:
        """Return torch's schedule for the shapes of *run*; call its ``step(target=run.weights, **run.inputs)``."""
        if run.shape not in self._built:
            while len(self._built) >= self.config.pp_cached_schedules:  # before new buffers are made
                self._built.popitem(last=False)
            hidden = torch.empty(self._splitter.hidden_shape(run), dtype=self._boundary_dtype(run), device=self.device)
            stages = [
                ModelStage(part, stage, hidden, self.group, self.config.loss_fn)
                for part, stage in zip(self.parts, self._stages, strict=True)
            ]
            self._built[run.shape] = self._builder(stages, run.count)
        self._built.move_to_end(run.shape)
        return self._built[run.shape]

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
            if self._stages[0].is_first:
                made = self._first_hidden(run).dtype
                entry: Any = self.parts[0].pipeline_entry
                codes += torch.tensor([_DTYPES.index(made), _DTYPES.index(entry.dtype)], device=self.device)
            # All ranks of this pipeline take part; the rank of the first stage knows the dtypes.
            dist.broadcast(codes, group_src=self.placement.rank_of(0), group=self.group)
            made, embedded = (_DTYPES[code] for code in codes.tolist())
            for part in self.parts:
                set_hollow_dtype(part, embedded)
            self._dtype = getattr(torch, self.config.dtype) if self.config.dtype is not None else made
        return self._dtype

    @torch.no_grad()
    def _first_hidden(self, run: Microbatches) -> Tensor:
        devices = [self.device] if self.device.type == "cuda" else []  # None would mean all of the machine
        with torch.random.fork_rng(devices), _mode(self.parts, False):
            # This forward belongs to no step, so the router statistics must not count its tokens.
            inputs = {name: value for name, value in run[0].items() if name != COUNTED}
            hidden: Tensor = run_part(self.parts[0], self._stages[0], None, inputs, None)
        if hidden.shape != self._splitter.hidden_shape(run):
            raise ValueError(
                f"the first stage makes hidden states of shape {tuple(hidden.shape)} of inputs that should give "
                f"{self._splitter.hidden_shape(run)}; sequence-sharded activations do not travel between stages"
            )
        return hidden

    # ---- evaluation ----

    def eval(self, batch: Batch) -> Tensor:
        """Return the mean loss of *batch* without gradients: 0-dim float32, equal on all stages."""
        run = Microbatches.of(self.parts[-1], batch, torch.ones((), device=self.device), self._size, 0)
        losses = [output.loss.float() for output in self._evaluate(run)]
        # A microbatch without labels has the mean 0/0 and counts as 0.
        shares = [torch.where(w > 0, loss * w, 0.0) for loss, w in zip(losses, run.weights, strict=False)]
        total = torch.stack(shares).sum() if shares else torch.zeros((), device=self.device)
        dist.all_reduce(total, group=self.group)  # all pipeline ranks, as in run()
        return total

    def logits(self, batch: Batch) -> Tensor | None:
        """Return the logits of *batch*, one row per row, on the ranks with the last stage; None on the others.

        Every pipeline rank calls it. Labels are not needed.
        """
        rows = next(value.shape[0] for value in batch.values() if isinstance(value, Tensor))
        size = next(size for size in range(self._size, 0, -1) if rows % size == 0)
        inputs = {name: value for name, value in batch.items() if name not in ("labels", "shift_labels")}
        outputs = self._evaluate(Microbatches(inputs, torch.empty(0), rows // size, rows))
        return torch.cat([output.logits for output in outputs]) if self.info.has_last_stage else None

    @property
    def _size(self) -> int:
        return self.config.pp_microbatch_size

    def _evaluate(self, run: Microbatches) -> list[Any]:
        with _mode(self.parts, False):
            return self._run_forward(run)

    @torch.no_grad()
    def _run_forward(self, run: Microbatches) -> list[Any]:
        hidden = torch.empty(self._splitter.hidden_shape(run), dtype=self._boundary_dtype(run), device=self.device)
        loss = self.config.loss_fn if "labels" in run.inputs else None
        with keep_gathered(self.parts):
            return forward_only(self.parts, self._stages, run, hidden, self.placement, self.group, loss)

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
