"""Run transformers models as stages of torch's pipelining; the only module that uses private parts of it.

These are the methods that ``ModelStage`` overrides, ``_PipelineScheduleRuntime`` and ``_load_csv`` for a schedule from
a file, and ``_schedule_visualizer`` for the order of actions; ``tests/test_pipeline_torch.py`` tests that they exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    _PipelineScheduleRuntime,
    get_schedule_class,
)

from nemo_dist_pipeline.partition.layer_outputs import of_last_stage
from nemo_dist_pipeline.partition.skeleton import accepted
from nemo_dist_pipeline.partition.stage_model import StageInfo, run_stage
from nemo_dist_pipeline.partition.tower_inputs import without_media
from nemo_dist_pipeline.runtime.microbatches import Unsplit
from nemo_dist_pipeline.schedule.actions import Action, Order, order_of
from nemo_dist_pipeline.schedule.schedules import Schedule

Loss = Any  # what an engine is given: ``inputs(batch)``, and ``(outputs, batch) -> (sum, count)``
TorchSchedule = PipelineScheduleSingle | PipelineScheduleMulti


def run_part(
    part: nn.Module, stage: StageInfo, hidden: Tensor | None, inputs: dict[str, Any], loss: Loss | None
) -> Any:
    """Run *part* on *hidden* (None at the first stage); return hidden states, or the output of the last stage.

    With *loss* the last stage returns what that makes of its output: a sum and a count. Every stage is given the
    labels, as a forward may read them before its blocks.
    """
    batch = inputs
    inputs = {**(inputs if loss is None else loss.inputs(inputs)), **accepted(part, {"use_cache": False})}
    output = run_stage(part, hidden, inputs if stage.is_first else without_media(part, inputs))
    if not stage.is_last:
        return output
    output = of_last_stage(output)
    return output if loss is None else loss(output, batch)


class ModelStage(PipelineStage):
    """A stage with known shapes, so that torch neither runs the model to find them nor clears gradients afterwards."""

    def __init__(
        self, part: nn.Module, stage: StageInfo, hidden: Tensor, group: dist.ProcessGroup, loss: Loss | None
    ) -> None:
        example = hidden.detach().requires_grad_()
        super().__init__(
            part,
            stage.index,
            stage.count,
            hidden.device,
            input_args=() if stage.is_first else (example,),
            output_args=torch.zeros((), device=hidden.device, requires_grad=True) if stage.is_last else (example,),
            group=group,
        )
        self._info = stage
        self._dtype = hidden.dtype
        self._loss = loss

    def forward_maybe_with_nosync(self, *args: Tensor, **kwargs: Any) -> Tensor:
        """Run the model: return hidden states for the next stage, or the loss."""
        inputs = {name: value.value if isinstance(value, Unsplit) else value for name, value in kwargs.items()}
        out = run_part(self.submod, self._info, args[0] if args else None, inputs, self._loss)
        if self._info.is_last:
            loss: Tensor = out.loss if self._loss is None else out[0]
            return loss
        hidden: Tensor = out.to(self._dtype).contiguous()
        # All parameters so far are frozen; the next stage sends a gradient all the same.
        return hidden if hidden.requires_grad or not torch.is_grad_enabled() else hidden.requires_grad_()

    def _post_metadata_inference_cleanup(self) -> None:
        """Do nothing: no inference ran, and the gradients that torch would clear are those accumulated so far."""


@attrs.frozen(kw_only=True)
class ScheduleBuilder:
    """Build torch's schedule: one by name, or the user's own from the file ``csv`` where ``schedule`` is None.

    ``scale_grads``: the schedule divides gradients by the number of microbatches.
    """

    schedule: Schedule | None
    csv: str | None = None
    scale_grads: bool = False

    def __call__(self, stages: Sequence[PipelineStage], microbatches: int) -> TorchSchedule:
        """Return torch's schedule over the *stages* of this rank; its loss is the weighted loss of each microbatch."""
        options: dict[str, Any] = {"loss_fn": weighted_loss, "scale_grads": self.scale_grads}
        if self.schedule is None:
            runtime = _PipelineScheduleRuntime(list(stages), microbatches, **options)
            runtime._load_csv(str(self.csv))
            return runtime
        kind = get_schedule_class(self.schedule.name)
        single = issubclass(kind, PipelineScheduleSingle)
        return kind(stages[0] if single else list(stages), microbatches, **options)  # type: ignore[no-any-return]


def weighted_loss(loss: Tensor, weight: Tensor) -> Tensor:
    """Return *loss* times *weight*; 0 for a microbatch without labels, whose mean is 0/0."""
    weight = weight.squeeze().to(loss.dtype)
    return torch.where(weight != 0, loss, torch.zeros_like(loss)) * weight


def torch_order(schedule: Schedule, pp_size: int, per_rank: int, microbatches: int) -> Order:
    """Return what torch's *schedule* makes every rank do, in order, without any process group."""
    if schedule.name == "1F1B":
        return _one_forward_one_backward(pp_size, microbatches)  # torch's own list for it is one microbatch off
    return order_of(get_schedule_ops(schedule.name, pp_size, microbatches, per_rank))


def _one_forward_one_backward(pp_size: int, microbatches: int) -> Order:
    lines = []
    for rank in range(pp_size):
        warmup = min(pp_size - 1 - rank, microbatches)
        line = [Action(rank, "F", index) for index in range(warmup)]
        for index in range(microbatches):
            if warmup + index < microbatches:
                line.append(Action(rank, "F", warmup + index))
            line.append(Action(rank, "B", index))
        lines.append(tuple(line))
    return tuple(lines)
