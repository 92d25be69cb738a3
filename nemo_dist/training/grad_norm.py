"""Gradient norms and parameter groups of tensors on different device meshes, which torch's operators do not mix."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from nemo_dist.mesh.mesh_context import MeshContext


def by_mesh(tensors: Iterable[Any]) -> dict[Any, list[Any]]:
    """Group tensors by device mesh; plain tensors are one group, under None."""
    groups: dict[Any, list[Any]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.device_mesh if isinstance(tensor, DTensor) else None, []).append(tensor)
    return groups


def one_mesh_per_group(params: Iterable[Any]) -> list[dict[str, Any]]:
    """Split parameter groups by device mesh, as torch's fused and foreach optimizers do not accept mixed ones."""
    listed = list(params)
    groups = listed if listed and isinstance(listed[0], dict) else [{"params": listed}]
    return [{**group, "params": members} for group in groups for members in by_mesh(list(group["params"])).values()]


def global_norm(grads: Iterable[Tensor], norm_type: float, axes: Iterable[str], mesh: MeshContext) -> Tensor:
    """Return the norm of all gradients, across all meshes and *axes*: a 0-dim float32 tensor; collective.

    ``axes`` are those along which ranks hold different parameters; the norm is all-reduced over each of them. The norm
    of a DTensor is that of the whole tensor.
    """
    norms = [_plain(get_total_norm(group, norm_type)) for group in by_mesh(grads).values()]
    local = torch.stack([norm.float().to(mesh.device) for norm in norms]) if norms else torch.zeros(1).to(mesh.device)
    infinite = norm_type == float("inf")
    total = local.max() if infinite else (local**norm_type).sum()
    for axis in axes:
        group = mesh.group(axis)
        if group is not None:
            dist.all_reduce(total, op=dist.ReduceOp.MAX if infinite else dist.ReduceOp.SUM, group=group)
    return total if infinite else total ** (1.0 / norm_type)


def _plain(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value
