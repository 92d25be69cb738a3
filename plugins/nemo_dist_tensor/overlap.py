"""Asynchronous tensor parallelism: inductor splits matrix products and overlaps their pieces with the collectives.

The names are private to torch; this is the only module that touches them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nemo_dist.errors import TopologyError

if TYPE_CHECKING:
    from nemo_dist.context import MeshContext


def enable(mesh: MeshContext) -> None:
    """Let ``torch.compile`` overlap the collectives along ``tp``; raise TopologyError off CUDA."""
    if mesh.device.type != "cuda":
        raise TopologyError(
            [
                "enable_async_tensor_parallel needs CUDA: the pieces move through symmetric memory between GPUs, which "
                f"device {mesh.device.type!r} does not have; leave it out"
            ]
        )
    import torch._inductor.config as inductor
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    inductor._micro_pipeline_tp = True
    enable_symm_mem_for_group(mesh["tp"].get_group().group_name)
    torch._dynamo.config.optimize_ddp = False
