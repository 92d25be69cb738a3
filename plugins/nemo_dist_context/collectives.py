"""Run differentiable collectives along the cp axis; all cp ranks take part in each.

They are torch's functional collectives, whose results selective activation checkpointing can see and keep.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_dist.torch_private import collective_operators as operators
from nemo_dist_context.sequence_layout import SequenceLayout, index_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class _Gather(torch.autograd.Function):
    """Gather all ranks' parts along dim 0; the backward sums the gradients of each part on its rank."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        whole = operators.all_gather_into_tensor(part.contiguous(), group.size(), group.group_name)
        return _wait(whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        part = operators.reduce_scatter_tensor(grad.contiguous(), "sum", ctx.group.size(), ctx.group.group_name)
        return _wait(part), None


class _Exchange(torch.autograd.Function):
    """Send the i-th slice along dim 0 to rank i, and stack what the ranks sent here; the backward sends it back."""

    @staticmethod
    def forward(ctx: Any, slices: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_to_all(slices, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(grad, ctx.group), None


def _all_to_all(slices: Tensor, group: ProcessGroup) -> Tensor:
    sizes = [1] * group.size()
    return _wait(operators.all_to_all_single(slices.contiguous(), sizes, sizes, group.group_name))


def _wait(pending: Tensor) -> Tensor:
    done: Tensor = operators.wait_tensor(pending)
    return done


def _apply(function: Any, part: Tensor, group: ProcessGroup) -> Tensor:
    result: Tensor = function.apply(part, group)
    return result


def gather_sequence(part: Tensor, group: ProcessGroup) -> Tensor:
    """Return the parts of all cp ranks, (batch, heads, part, width), one after the other along dim 2; all take part."""
    whole: Tensor = _apply(_Gather, part.movedim(2, 0), group)
    return whole.movedim(0, 2)


def joined(part: Tensor, length: int, layout: SequenceLayout, group: ProcessGroup) -> Tensor:
    """Return the tokens of all cp ranks in their order, (rows, length, ...), from this rank's; all take part.

    The backward sums the gradients of all ranks, each of which may make its own loss of the whole.
    """
    whole = layout.padded(length)
    order = index_of(layout, "restoring", whole, part.device)[:length]
    return _apply(_Gather, part.movedim(1, 0), group).index_select(0, order).movedim(0, 1)


def to_heads(part: Tensor, group: ProcessGroup) -> Tensor:
    """Exchange this rank's part of the sequence with all heads for the whole sequence with a part of the heads.

    (batch, heads, part, width) -> (batch, heads/size, size*part, width), parts in rank order; all cp ranks take part.
    """
    slices = torch.stack(part.chunk(group.size(), dim=1))
    return torch.cat(_apply(_Exchange, slices, group).unbind(0), dim=2)


def to_sequence(heads: Tensor, group: ProcessGroup) -> Tensor:
    """Undo ``to_heads``; all cp ranks take part."""
    slices = torch.stack(heads.chunk(group.size(), dim=2))
    return torch.cat(_apply(_Exchange, slices, group).unbind(0), dim=1)
