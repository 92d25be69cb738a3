"""Let DoRA beside tensor-parallel layers scale this rank's features by the magnitude and the norm of their whole rows.

DoRA divides every row of a weight, with LoRA's product in it, by its norm, and multiplies it by a magnitude that is
trained. No gradient flows through the norm. A rank that holds whole rows computes their norms alone; where each holds a
part of every row, the squares are summed over the ranks. The magnitude is whole on every rank, as LoRA's matrices are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nemo_dist.mesh.dtensor import local
from nemo_dist.plugin.forwards import wrap_forward
from nemo_dist_tensor.collectives import gather
from nemo_dist_tensor.installed import Installed
from nemo_dist_tensor.styles import GATHERED, ROW


def dora(magnitude: nn.Module, installed: Installed) -> None:
    """Let *magnitude*, PEFT's module of DoRA beside a layer that is *installed*, compute like that layer."""
    wrap_forward(magnitude, partial(_extra, magnitude, installed))


def _extra(
    magnitude: Any,
    installed: Installed,
    _: Callable[..., Tensor],
    value: Tensor,
    *,
    lora_A: nn.Linear,  # PEFT's names
    lora_B: nn.Linear,
    scaling: float,
    base_layer: Any,
    base_result: Tensor,
    **_others: Any,
) -> Tensor:
    """Return what DoRA adds to *base_result*; both are cut, or whole, as the output of the layer is."""
    stays_cut = installed.style not in ROW | GATHERED
    norm = _norm(installed, value.dtype, lora_A.weight, lora_B.weight, scaling, base_layer.weight)
    scale = (installed.rows(magnitude.weight) if stays_cut else magnitude.weight) / norm
    plain = base_result if base_layer.bias is None else base_result - _bias(installed, base_layer.bias, len(norm))
    product: Tensor = lora_B(lora_A(value))
    return (scale - 1) * plain + scale * product * scaling


def _bias(installed: Installed, bias: Tensor, width: int) -> Tensor:
    """Return the *bias* of the features of the layer's output, of which there are *width* on this rank."""
    if installed.style in ROW:
        return local(bias)
    mine = (installed.own_rows or local)(bias)
    return gather(mine, 0, width, installed.peers) if installed.style in GATHERED else mine


@torch.no_grad()
def _norm(
    installed: Installed,
    dtype: torch.dtype,
    first: Tensor,
    second: Tensor,
    scaling: float,
    weight: Tensor,
) -> Tensor:
    """Return the norms of the rows of *weight* with LoRA's product in it: those of this rank's output, in *dtype*."""
    peers = installed.peers
    mine = (installed.own_rows or local)(weight).to(dtype)
    if installed.style in ROW:
        part = mine + scaling * (second @ installed.columns(first)).to(dtype)
        squares = part.to(torch.promote_types(dtype, torch.float32)).square().sum(dim=1)
        return peers.all_reduce(squares).sqrt().to(dtype)  # all peers have a part of every row
    rows = mine + scaling * (installed.rows(second) @ first).to(dtype)
    norm = torch.linalg.norm(rows, dim=1).to(dtype)
    return peers.all_gather(norm, 0, len(second)) if installed.style in GATHERED else norm
