"""Convert between global tensors and this rank's shards, replace parameters by shards, and digest them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers.distributed.sharding_utils import DtensorShardOperation

from nemo_dist.torch_private import dtensor_of

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element
Box = tuple[tuple[int, int], ...]  # (start, stop) along each dim
_MOST_BOXES = 4096


def local(tensor: Tensor) -> Tensor:
    """Return this rank's local tensor of a DTensor, or a plain tensor itself; gradients flow back through it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def from_local(part: Tensor, mesh: DeviceMesh, placements: Sequence[Any], like: Tensor) -> DTensor:
    """Return the DTensor whose local tensor on this rank is *part*; its global shape and stride are those of *like*.

    *part* stays on its device, also where that is not the mesh's (shards that are offloaded to the CPU). No
    communication: that the local tensors of all ranks fit together is not checked.
    """
    if part.device.type not in (mesh.device_type, "meta"):  # torch's public function would move it there
        return dtensor_of(part, mesh, placements, like)
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def local_slice(full: Tensor, shard: DTensor) -> Tensor:
    """Return the slice of the global tensor *full* that this rank holds of the DTensor *shard*; no communication.

    Handles strided shards too (packed projections, two mesh axes on one tensor dim). The result is a view of *full*
    where the slice is contiguous.
    """
    boxes = held_boxes(shard)
    parts = [full[tuple(slice(start, stop) for start, stop in box)] for box in boxes]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim_of_difference(boxes))


class _Spans:
    """Stands for a whole tensor that is sliced: keeps the spans, as (start, stop) for each dim."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape, self.taken = list(shape), list[Box]()

    def get_shape(self) -> list[int]:
        return self.shape

    def __getitem__(self, spans: Any) -> Tensor:
        if spans is Ellipsis:
            spans = tuple(slice(0, size) for size in self.shape)
        self.taken.append(tuple((span.start, span.stop) for span in spans))
        return torch.empty([0] * len(self.shape))


_boxes: dict[Any, tuple[Box, ...]] = {}  # torch takes 30 ms for a strided shard on thousands of ranks


def held_boxes(tensor: Tensor) -> tuple[Box, ...]:
    """Return the boxes of the global tensor that this rank holds of *tensor*: (start, stop) for each dim.

    Several ones, of a strided shard, lie one after the other along the dim in which they differ, in this order.
    """
    if not isinstance(tensor, DTensor):
        return (tuple((0, size) for size in tensor.shape),)
    key = (tensor.shape, tensor.device_mesh, tuple(tensor.placements))
    if key not in _boxes:
        if len(_boxes) >= _MOST_BOXES:
            _boxes.clear()
        held = local(tensor)
        spans: Any = _Spans(tensor.shape)
        if held.numel():
            DtensorShardOperation(tensor).shard_tensor(spans)
        _boxes[key] = tuple(spans.taken) or (tuple((0, size) for size in held.shape),)
    return _boxes[key]


def dim_of_difference(boxes: Sequence[Box]) -> int:
    """Return the dim in which *boxes*, of one tensor, differ."""
    return next((dim for dim, spans in enumerate(zip(*boxes, strict=True)) if len(set(spans)) > 1), 0)


def filled(parameter: nn.Parameter, value: Tensor, device: torch.device) -> nn.Parameter:
    """Return a new parameter laid out like *parameter*, with the values of the global tensor *value*, on *device*."""
    if isinstance(parameter, DTensor):
        own = local_slice(value, parameter).to(device)
        value = own.clone(memory_format=torch.contiguous_format)  # or the slice would keep the whole tensor alive
    return placed(parameter, value.to(device))


def placed(parameter: nn.Parameter, own: Tensor) -> nn.Parameter:
    """Return a new parameter laid out like *parameter*, whose local tensor is *own*."""
    shard = own
    if isinstance(parameter, DTensor):
        shard = from_local(own, parameter.device_mesh, parameter.placements, like=parameter)
    return nn.Parameter(shard, requires_grad=parameter.requires_grad)


def parameter_slots(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Yield each (full name, module, name in the module, parameter) of *model*.

    A parameter that several modules share is yielded once for each of them. The caller may replace a parameter on its
    module while iterating.
    """
    for prefix, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            yield f"{prefix}.{name}" if prefix else name, module, name, parameter


def digest(tensor: Tensor) -> Tensor:
    """Return the sum of the bits of this rank's part of *tensor* as a 0-dim int64; equal tensors have equal ones."""
    values = local(tensor).contiguous()
    if values.dtype.is_complex:
        values = torch.view_as_real(values)
    if values.dtype is torch.bool:
        values = values.to(torch.int8)
    flat = values.view(-1)  # summed by words of 8 bytes, as torch is slow at sums of another dtype than the elements
    words = flat[: flat.numel() - flat.numel() % (8 // values.element_size())]
    if words.storage_offset() * words.element_size() % 8:
        words = words.clone()  # a view as int64 must begin at a whole word
    rest = flat[words.numel() :].view(_BITS[values.element_size()])
    return words.view(torch.int64).sum() + rest.sum(dtype=torch.int64)
