"""Gradient norms and parameter groups of tensors on different device meshes, which torch's operators do not mix."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.utils import get_total_norm

from nemo_dist.checkpoint.optimizer_state import GROUP
from nemo_dist.mesh.dtensor import local
from nemo_dist.mesh.mesh_context import MeshContext
from nemo_dist.mesh.rank_group import RankGroup


def by_mesh(tensors: Iterable[Any]) -> dict[Any, list[Any]]:
    """Group tensors by device mesh; plain tensors are one group, under None."""
    groups: dict[Any, list[Any]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.device_mesh if isinstance(tensor, DTensor) else None, []).append(tensor)
    return groups


def one_mesh_per_group(params: Iterable[Any]) -> list[dict[str, Any]]:
    """Split parameter groups by device mesh, as torch's fused and foreach optimizers do not accept mixed ones.

    Each has its index among *params* as its ``group_index``. One that is empty here stays, as other ranks may have its
    parameters.
    """
    listed = list(params)
    groups = listed if listed and isinstance(listed[0], dict) else [{"params": listed}]
    return [
        {**group, "params": members, GROUP: index}
        for index, group in enumerate(groups)
        for members in (by_mesh(group["params"]) or {None: []}).values()
    ]


def global_norm(grads: Iterable[Tensor], norm_type: float, axes: Iterable[str], mesh: MeshContext) -> Tensor:
    """Return the norm of all gradients, across all meshes and *axes*: a 0-dim float32 tensor; collective.

    ``axes`` are those along which ranks hold different parameters. The norm of a DTensor is that of the whole tensor.
    There is one all-reduce over all ranks of *mesh*, to which each rank adds its share of what it holds: of a gradient
    that n ranks hold, one n-th. So every rank gets the same bits.
    """
    ranks = RankGroup.of(mesh)
    infinite = norm_type == float("inf")
    apart = math.prod(mesh.size(axis) for axis in axes)
    terms, parts = [torch.zeros((), device=mesh.device)], apart
    for count, held in _by_number_of_parts(grads).items():
        norm = get_total_norm(held, norm_type).float().to(mesh.device)
        terms.append(norm if infinite else norm**norm_type * (count * apart / ranks.size))
        parts = max(parts, count * apart)
    if infinite:
        return _greatest(torch.stack(terms).max(), ranks) if parts > 1 else torch.stack(terms).max()
    total = torch.stack(terms).sum()
    if parts > 1:
        ranks.reduce(total, dist.ReduceOp.SUM)
    else:
        total = total * ranks.size
    return total ** (1.0 / norm_type)


def _greatest(value: Tensor, ranks: RankGroup) -> Tensor:
    """Return the greatest *value* of all ranks; NaN where one has NaN, which a maximum of some backends passes by."""
    unknown = value.isnan()
    both = torch.stack([torch.where(unknown, 0, value), unknown.to(value.dtype)])
    ranks.reduce(both, dist.ReduceOp.MAX)
    return torch.where(both[1] > 0, torch.nan, both[0])


def _by_number_of_parts(grads: Iterable[Tensor]) -> dict[int, list[Tensor]]:
    """Return the local tensors of *grads*, by the number of ranks that hold different parts of the same gradient.

    Those without elements are left out, as torch has no greatest absolute value of nothing.
    """
    found: dict[int, list[Tensor]] = {}
    for grad in grads:
        parts = 1
        if isinstance(grad, DTensor):
            if any(placement.is_partial() for placement in grad.placements):
                grad = grad.redistribute(placements=[Replicate() if p.is_partial() else p for p in grad.placements])
            sizes = zip(grad.device_mesh.shape, grad.placements, strict=True)
            parts = math.prod(size for size, placement in sizes if hasattr(placement, "dim"))
        own, held = local(grad), found.setdefault(parts, [])
        if own.numel():
            held.append(own)
    return found
