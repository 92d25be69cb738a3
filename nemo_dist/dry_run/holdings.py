"""The bytes that a rank holds of parameters, gradients and optimizer state, and reads of a checkpoint of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nemo_dist.mesh.dtensor import held_boxes, local
from nemo_dist.training.grad_norm import one_mesh_per_group


@attrs.frozen(kw_only=True)
class Holdings:
    """Bytes on one rank. ``read_bytes`` are those of the slices of its parameters and persistent buffers in files."""

    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    read_bytes: int

    @classmethod
    def of(cls, parts: Sequence[nn.Module], optimizer: Optimizer) -> Holdings:
        """Measure *parts* after a step of *optimizer*."""
        parameters = _once(parameter for part in parts for parameter in part.parameters())
        states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        stored = _once(tensor for part in parts for tensor in part.state_dict(keep_vars=True).values())
        return cls(
            parameter_bytes=_bytes(parameters),
            gradient_bytes=_bytes(p.grad for p in parameters if p.grad is not None),
            optimizer_bytes=_bytes(states),
            read_bytes=sum(_sliced(tensor) for tensor in stored),
        )


def stepped(parts: Sequence[nn.Module], optimizer_type: Callable[..., Optimizer]) -> Optimizer:
    """Return an optimizer of that type that has stepped *parts*, which are on meta, with gradients of no value."""
    parameters = _once(p for part in parts for p in part.parameters() if p.requires_grad)
    optimizer = optimizer_type(one_mesh_per_group(parameters))
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    return optimizer


def _once(tensors: Iterable[Any]) -> list[Any]:
    return list({id(tensor): tensor for tensor in tensors if isinstance(tensor, Tensor)}.values())


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(own.numel() * own.element_size() for own in map(local, tensors))


def _sliced(tensor: Tensor) -> int:
    """Return the bytes of the slices that the reader of transformers takes of a file for *tensor*."""
    boxes = held_boxes(tensor)
    return sum(math.prod(stop - start for start, stop in box) for box in boxes) * tensor.element_size()
