"""Run only the forward of a pipeline, without gradients or schedule: every stage runs the microbatches in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_dist_pipeline.partition.stage_model import StageInfo
from nemo_dist_pipeline.runtime.microbatches import Microbatches
from nemo_dist_pipeline.runtime.torch_stage import Loss, run_part

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

    ``hidden`` has the shape and dtype of the hidden states between stages. All pipeline ranks take part. Each goes
    through its stages in ascending order, so it posts sends and receives in the order that its neighbours expect.
    """
    local: dict[int, list[Tensor]] = {}  # outputs for a next stage on this same rank
    sent: list[tuple[dist.Work | None, Tensor]] = []
    outputs: list[Any] = []
    for part, stage in sorted(zip(parts, stages, strict=True), key=lambda pair: pair[1].index):
        before, after = (_peer(stage.index + step, stage, placement, group) for step in (-1, 1))
        from_here = local.pop(stage.index, None)
        for index in range(run.count):
            received = from_here[index] if from_here else None
            if received is None and before is not None:
                received = torch.empty_like(hidden)
                dist.recv(received, group_src=before, group=group)
            out = run_part(part, stage, received, run[index], loss)
            if stage.is_last:
                outputs.append(out)
                continue
            out = out.to(hidden.dtype).contiguous()
            if after is None:
                local.setdefault(stage.index + 1, []).append(out)
            else:
                sent.append((dist.isend(out, group_dst=after, group=group), out))
    for work, _ in sent:
        if work is not None:
            work.wait()
    return outputs


def _peer(neighbour: int, stage: StageInfo, placement: StagePlacement, group: dist.ProcessGroup) -> int | None:
    """Return the pipeline rank of the stage *neighbour*; None when there is none, or it is here."""
    if not 0 <= neighbour < stage.count:
        return None
    rank = placement.rank_of(neighbour, stage.count)
    return None if rank == dist.get_rank(group) else rank
