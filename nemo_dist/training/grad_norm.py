"""Gradient norms and parameter groups of tensors on different device meshes, which torch's operators do not mix."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from nemo_dist.checkpoint.optimizer_state import GROUP
from nemo_dist.mesh.dtensor import local
from nemo_dist.mesh.mesh_context import MeshContext
from nemo_dist.mesh.rank_group import RankGroup
from nemo_dist.plugin.hookspecs import RuntimePart


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


def clip(
    parts: Sequence[RuntimePart],
    named: Callable[[], Iterable[tuple[str, nn.Parameter]]],
    max_norm: float,
    norm_type: float,
    mesh: MeshContext,
) -> Tensor:
    """Clip the gradients of the parameters that *named* gives, and those that plugins keep; return the norm before.

    *parts* are those of the plugins; the rest is as :meth:`nemo_dist.Runtime.clip_grad_norm_` says.
    """
    for part in parts:
        if part.before_clip is not None:
            part.before_clip()
    skipped = {id(parameter) for part in parts for parameter in part.norm_skip}
    parameters = [parameter for _, parameter in named() if parameter.grad is not None]
    counted = [parameter.grad for parameter in parameters if id(parameter) not in skipped]
    kept = [grad for part in parts if part.kept_gradients is not None for grad in part.kept_gradients()]
    axes = tuple(axis for part in parts for axis in part.norm_axes)
    norm = global_norm([*(grad for grad in counted if grad is not None), *kept], norm_type, axes, mesh)
    if max_norm == math.inf:  # inf / inf would scale all gradients by NaN where one is inf
        return norm
    for group in by_mesh(parameters).values():
        clip_grads_with_norm_(group, max_norm, norm)
    if kept:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch clips the others
        for grad in kept:
            grad.mul_(factor)
    return norm
