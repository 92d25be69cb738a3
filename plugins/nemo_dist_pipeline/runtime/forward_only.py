"""Run only the forward of a pipeline, without gradients or schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_dist_pipeline.partition.stage_model import StageInfo
from nemo_dist_pipeline.runtime.microbatches import Microbatches
from nemo_dist_pipeline.runtime.torch_stage import Loss, run_part
from nemo_dist_pipeline.schedule.forward_order import forward_order

if TYPE_CHECKING:
    from nemo_dist_pipeline.schedule.stage_placement import StagePlacement


def forward_only(
    parts: Sequence[nn.Module],
    stages: Sequence[StageInfo],
    run: Microbatches,
    hidden: Tensor,
    placement: StagePlacement,
    group: dist.ProcessGroup,
    loss: Loss | None,
) -> list[Any]:
    """Return the outputs of the microbatches on the rank with the last stage, an empty list on the others.

    With a *loss*, what that makes of each output.

    ``hidden`` has the shape and dtype of the hidden states between stages. All pipeline ranks take part, and go through
    the same list of forwards, so that sends and receives cannot deadlock (:func:`forward_order`).
    """
    here = {stage.index: (part, stage) for part, stage in zip(parts, stages, strict=True)}
    count = stages[0].count
    owners = tuple(placement.rank_of(index, count) for index in range(count))
    entering: dict[tuple[int, int], tuple[dist.Work | None, Tensor]] = {}  # by stage and microbatch
    sent: list[tuple[dist.Work | None, Tensor]] = []
    outputs: list[Any] = []
    for action in forward_order(owners, run.count):
        index, after = action.microbatch, action.stage + 1
        if action.stage in here:
            out = run_part(*here[action.stage], _arrived(entering.pop((action.stage, index), None)), run[index], loss)
            if after == count:
                outputs.append(out)
                continue
            out = out.to(hidden.dtype).contiguous()
            if after in here:
                entering[after, index] = (None, out)
            else:
                sent.append((dist.isend(out, group_dst=owners[after], group=group), out))
        elif after in here:
            received = torch.empty_like(hidden)
            entering[after, index] = (dist.irecv(received, group_src=owners[action.stage], group=group), received)
    for work, _ in sent:
        if work is not None:
            work.wait()
    return outputs


def broadcast_tensors(
    tensors: dict[str, Tensor], source: int, group: dist.ProcessGroup, device: torch.device
) -> dict[str, Tensor]:
    """Return the *tensors* of the rank *source* of *group* on all its ranks, which all take part."""
    told: list[Any] = [[(name, value.shape, value.dtype) for name, value in tensors.items()]]
    dist.broadcast_object_list(told, group_src=source, group=group, device=device)
    found = {}
    for name, shape, dtype in told[0]:
        found[name] = tensors[name].contiguous() if name in tensors else torch.empty(shape, dtype=dtype, device=device)
        dist.broadcast(found[name], group_src=source, group=group)
    return found


def _arrived(message: tuple[dist.Work | None, Tensor] | None) -> Tensor | None:
    """Wait for *message* and return its tensor; None at the first stage, which gets none."""
    if message is None:
        return None
    work, tensor = message
    if work is not None:
        work.wait()
    return tensor
