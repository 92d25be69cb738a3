"""Shard parameters on meta over the tensor-parallel mesh, as DTensors; tied parameters stay tied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn
from torch.distributed.tensor import Placement, Shard, distribute_tensor
from transformers.pytorch_utils import Conv1D

from nemo_dist.torch_private import StridedShard
from nemo_dist_tensor.collectives import Peers
from nemo_dist_tensor.styles import COLUMN, ROW
from nemo_dist_tensor.tp_plan import generic

if TYPE_CHECKING:
    from torch import Tensor

HALVES = 2  # gate and up projection in one matrix


def of_module(module: nn.Module, style: str, parameter: str) -> Placement | None:
    """Return how the *style* of *module* shards its own *parameter*; None leaves it whole."""
    transposed = isinstance(module, Conv1D) and parameter == "weight"  # (in, out), unlike that of nn.Linear
    if style in COLUMN or style == "embedding_rowwise":
        return Shard(1 if transposed else 0) if parameter in ("weight", "bias") else None
    if style in ROW:  # a bias is added once, after the sum
        return Shard(0 if transposed else 1) if parameter == "weight" else None
    if style == "embedding_colwise":
        return Shard(1)
    return None


def of_parameter(style: str, tensor: Tensor) -> Placement | None:
    """Return how the *style* of a bare parameter shards it: a *tensor* of (..., out, in); None leaves it whole."""
    out, into = max(tensor.ndim - 2, 0), tensor.ndim - 1
    placements: dict[str, Placement] = {
        "colwise": Shard(out),
        "packed_colwise": StridedShard(out, split_factor=HALVES),
        "rowwise": Shard(into),
        "packed_rowwise": StridedShard(into, split_factor=HALVES),
    }
    return placements.get(style)


def packed_problem(name: str, tensor: Tensor, placement: Placement, ranks: int) -> str:
    """Say why a packed parameter cannot be sharded, or return an empty string."""
    if not isinstance(placement, StridedShard):
        return ""
    size = tensor.shape[placement.dim]
    if placement.dim == 0:  # fully_shard shards dim 0 too, and misplaces the rows of a packed shard there
        return (
            f"{generic(name)} has {tensor.ndim} dims, but a packed style fits experts' parameters of 3 dims; use "
            "'colwise_gather_output' for it and 'rowwise_split_input' for what reads its halves"
        )
    if size % (HALVES * ranks):
        return (
            f"{generic(name)} packs two projections of {size // HALVES} features, which do not divide over {ranks} "
            "tensor-parallel ranks; use a tp_size that divides them"
        )
    return ""


def tie_problems(model: nn.Module, placements: Mapping[str, Placement | None]) -> list[str]:
    """Say which tied parameters a plan would shard in two ways, one sentence each: they are never untied."""
    slots: dict[int, dict[str, Placement | None]] = {}
    ties: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}  # some are tied when they are loaded
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        source = parameters.get(ties.get(name, name), parameter)
        slots.setdefault(id(source), {})[name] = placements.get(name)
    return [
        f"{' and '.join(names)} are one tied parameter, but the plan cuts it as {' and '.join(map(str, cuts))}; "
        "give its modules rules that cut it alike"
        for names in slots.values()
        if len(cuts := list(dict.fromkeys(names.values()))) > 1
    ]


def shard(model: nn.Module, placements: Mapping[str, Placement | None], peers: Peers) -> None:
    """Replace the parameters of *model* that *placements* names by DTensors on meta, in every module that uses them."""
    done: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            placement = placements.get(f"{prefix}.{name}" if prefix else name)
            if placement is None:
                continue
            if id(parameter) not in done:
                whole = distribute_tensor(parameter.detach(), peers.mesh, [placement], src_data_rank=None)
                done[id(parameter)] = nn.Parameter(whole, requires_grad=parameter.requires_grad)
            module._parameters[name] = done[id(parameter)]
