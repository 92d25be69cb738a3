"""The one place that touches the inside of torch's pipelining: its stages on transformers models, and its schedules.

What is not public there: the methods that ``ModelStage`` overrides, ``_PipelineScheduleRuntime`` and ``_load_csv`` for
a schedule from a file, and the mock stages of ``_schedule_visualizer``; ``tests/test_pipeline_torch.py`` holds them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    _PipelineScheduleRuntime,
    get_schedule_class,
)

from nemo_dist_pipeline.partition.stage_model import StageInfo
from nemo_dist_pipeline.schedule.actions import Action, Order, order_of
from nemo_dist_pipeline.schedule.schedules import Schedule

Loss = Callable[[Tensor, Tensor], Tensor]
TorchSchedule = PipelineScheduleSingle | PipelineScheduleMulti


def run_part(
    part: nn.Module, stage: StageInfo, hidden: Tensor | None, inputs: dict[str, Any], loss: Loss | None
) -> Any:
    """Run *part* on *hidden* (None at the first stage): hidden states, or the last stage's output with its loss."""
    if hidden is not None:
        inputs = {**inputs, "inputs_embeds": hidden}
    inputs["use_cache"] = False
    if not stage.is_last:
        return part(**{name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")})
    if loss is None:
        return part(**inputs)
    output = part(**{name: value for name, value in inputs.items() if name != "labels"})
    output["loss"] = loss(output.logits, inputs["labels"])
    return output


class ModelStage(PipelineStage):
    """A stage whose shapes are known beforehand: torch need not run the model to find them, and clears no gradients."""

    def __init__(
        self, part: nn.Module, stage: StageInfo, hidden: Tensor, group: dist.ProcessGroup, loss: Loss | None
    ) -> None:
        given = hidden.detach().requires_grad_()
        super().__init__(
            part,
            stage.index,
            stage.count,
            hidden.device,
            input_args=() if stage.is_first else (given,),
            output_args=torch.zeros((), device=hidden.device, requires_grad=True) if stage.is_last else (given,),
            group=group,
        )
        self._info = stage
        self._dtype = hidden.dtype
        self._loss = loss

    def forward_maybe_with_nosync(self, *args: Tensor, **kwargs: Any) -> Tensor:
        """Run the model: return hidden states for the next stage, or the loss."""
        out = run_part(self.submod, self._info, args[0] if args else None, kwargs, self._loss)
        if self._info.is_last:
            loss: Tensor = out.loss
            return loss
        hidden: Tensor = out.to(self._dtype).contiguous()
        # Frozen parameters before the first trainable one: later stages send gradients all the same.
        return hidden if hidden.requires_grad or not torch.is_grad_enabled() else hidden.requires_grad_()

    def _post_metadata_inference_cleanup(self) -> None:
        """Do nothing: no inference ran, and the gradients that torch would clear are those accumulated so far."""


@attrs.frozen(kw_only=True)
class Build:
    """How to build a schedule: which, the file it is in if it is the user's own, and whether it divides gradients."""

    schedule: Schedule | None
    csv: str | None = None
    scale_grads: bool = False

    def __call__(self, stages: Sequence[PipelineStage], microbatches: int) -> TorchSchedule:
        """Return torch's schedule over the *stages* of this rank; its loss is the weighted loss of each microbatch."""
        options: dict[str, Any] = {"loss_fn": weighted, "scale_grads": self.scale_grads}
        if self.schedule is None:
            runtime = _PipelineScheduleRuntime(list(stages), microbatches, **options)
            runtime._load_csv(str(self.csv))
            return runtime
        made = get_schedule_class(self.schedule.name)
        single = issubclass(made, PipelineScheduleSingle)
        return made(stages[0] if single else list(stages), microbatches, **options)  # type: ignore[no-any-return]


def weighted(loss: Tensor, weight: Tensor) -> Tensor:
    """Return the weighted loss; a microbatch without labels has the mean 0/0, and no share."""
    weight = weight.squeeze().to(loss.dtype)
    return torch.where(weight > 0, loss, torch.zeros_like(loss)) * weight


def torch_order(schedule: Schedule, pp_size: int, per_rank: int, microbatches: int) -> Order:
    """Return what torch's *schedule* makes every rank do, in order, without any process group."""
    if schedule.name == "1F1B":
        return _one_forward_one_backward(pp_size, microbatches)  # torch's own list for it is one microbatch off
    return order_of(get_schedule_ops(schedule.name, pp_size, microbatches, per_rank))


def _one_forward_one_backward(pp_size: int, microbatches: int) -> Order:
    lines = []
    for rank in range(pp_size):
        ahead = min(pp_size - 1 - rank, microbatches)
        line = [Action(rank, "F", index) for index in range(ahead)]
        for index in range(microbatches):
            if ahead + index < microbatches:
                line.append(Action(rank, "F", ahead + index))
            line.append(Action(rank, "B", index))
        lines.append(tuple(line))
    return tuple(lines)


def reshard(parts: Sequence[nn.Module]) -> None:
    """Free what FSDP gathered for *parts*, where a forward without a backward leaves it gathered."""
    for part in parts:
        for module in part.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
