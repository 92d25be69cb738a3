"""The arithmetic of sharded tensors: what a rank holds of a DTensor, and parameters replaced by shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers.distributed.sharding_utils import DtensorShardOperation


def local(tensor: Tensor) -> Tensor:
    """Return what this rank holds of *tensor*, a DTensor or a plain one; gradients flow back to it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def from_local(part: Tensor, mesh: DeviceMesh, placements: Sequence[Any], like: Tensor) -> DTensor:
    """Return the DTensor of which *part* is this rank's; its global shape and strides are those of *like*.

    No communication: ranks do not compare what they hold.
    """
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def local_slice(full: Tensor, shard: DTensor) -> Tensor:
    """Return the slice of the global tensor *full* that this rank holds of *shard*; no communication.

    Strided shards (packed projections, two mesh axes on one dim) included; a view where the slice is contiguous.
    """
    found = DtensorShardOperation(shard).shard_tensor(full)
    return full if found is None else found  # None is only for experts stored one by one


def filled(parameter: nn.Parameter, value: Tensor, device: torch.device) -> nn.Parameter:
    """Return *parameter* with *value*, the global tensor, on *device*: of a DTensor this rank's slice."""
    if not isinstance(parameter, DTensor):
        return nn.Parameter(value.to(device), requires_grad=parameter.requires_grad)
    own = local_slice(value, parameter).to(device).clone()  # a copy, or the slice would keep the whole tensor alive
    shard = from_local(own, parameter.device_mesh, parameter.placements, like=parameter)
    return nn.Parameter(shard, requires_grad=parameter.requires_grad)


def parameter_slots(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Yield every place of *model* that holds a parameter: its full name, the module, the name in it, the parameter.

    A parameter that modules share is yielded once for each of them. Places may be filled anew meanwhile.
    """
    for prefix, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            yield f"{prefix}.{name}" if prefix else name, module, name, parameter
