"""Run the collectives of a tensor-parallel group, each with the backward that keeps gradients exact.

All ranks of the group take part in each. Gradients are of two kinds. If all ranks hold equal copies of a tensor and use
it in the *same* way, every rank computes the whole gradient. If they use it in *different* ways (each multiplies it by
its own columns), every rank computes a partial gradient, and the sum is the whole one. ``enter`` marks the change from
the first kind to the second; the other functions keep the kind. A dim that does not divide is split as ``torch.chunk``
does, so only the last pieces are short or empty; they are padded for a collective, and the padding is dropped again.

torch's functional collectives are used because ``torch.compile`` and selective checkpointing know them; no other module
of this plugin calls them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from nemo_dist.torch_private import all_gather_single, reduce_scatter_single
from nemo_dist.torch_private import functional_collectives as functional

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh


@attrs.frozen(eq=False)
class Peers:
    """The tensor-parallel ranks that share the same matrices: their mesh and group, and this rank among them."""

    mesh: DeviceMesh
    group: dist.ProcessGroup
    size: int
    rank: int

    @classmethod
    def along(cls, mesh: DeviceMesh) -> Peers:
        """Return the peers of this rank along the 1-D *mesh*."""
        return cls(mesh, mesh.get_group(), mesh.size(), mesh.get_local_rank())

    def bounds(self, total: int) -> tuple[int, int]:
        """Return where this rank's piece of a dim of *total* starts, and how long it is (0 at the far end)."""
        most = -(-total // self.size)
        start = min(self.rank * most, total)
        return start, min(most, total - start)

    def all_reduce(self, value: Tensor, operation: str = "sum") -> Tensor:
        """Return the sum (or "max") over the peers, equal bit for bit on all of them."""
        done: Tensor = functional.wait_tensor(functional.all_reduce(value.contiguous(), operation, self.group))
        return done

    def piece(self, value: Tensor, dim: int) -> Tensor:
        """Return this rank's piece of *value* along *dim*, contiguous."""
        start, length = self.bounds(value.shape[dim])
        return value.narrow(dim, start, length).contiguous()

    def all_gather(self, piece: Tensor, dim: int, total: int) -> Tensor:
        """Return the pieces of all peers joined along *dim*, which is *total* long."""
        most = -(-total // self.size)
        padded = _padded(piece, dim, most).movedim(dim, 0).contiguous()
        joined: Tensor = functional.wait_tensor(all_gather_single(padded, 0, self.group))
        # Always a copy: FSDP2 cannot hook a view that a block returns.
        return joined.narrow(0, 0, total).movedim(0, dim).clone(memory_format=torch.contiguous_format)

    def reduce_scatter(self, value: Tensor, dim: int) -> Tensor:
        """Return this rank's piece, along *dim*, of the sum over the peers."""
        total = value.shape[dim]
        most = -(-total // self.size)
        whole = _padded(value, dim, most * self.size).movedim(dim, 0).contiguous()
        mine: Tensor = functional.wait_tensor(reduce_scatter_single(whole, "sum", 0, self.group))
        return mine.narrow(0, 0, self.bounds(total)[1]).movedim(0, dim).contiguous()


def _padded(value: Tensor, dim: int, length: int) -> Tensor:
    missing = length - value.shape[dim]
    if not missing:
        return value
    after = [0, missing] + [0, 0] * (value.dim() - 1 - dim % value.dim())
    return pad(value, after[2:] + after[:2])


def enter(value: Tensor, peers: Peers) -> Tensor:
    """Return *value*, which every rank will use differently; the backward sums the ranks' partial gradients."""
    return _one(_Enter, value, peers) if value.requires_grad and torch.is_grad_enabled() else value


def reduce(value: Tensor, peers: Peers) -> Tensor:
    """Return the sum of the ranks' *value*; in the backward every rank gets the whole gradient."""
    return _one(_Reduce, value, peers)


def gather(piece: Tensor, dim: int, total: int, peers: Peers) -> Tensor:
    """Return the whole tensor, which every rank will use the same way; the backward keeps this rank's piece."""
    return _one(_Gather, piece, dim, total, peers)


def split(value: Tensor, dim: int, peers: Peers) -> Tensor:
    """Return this rank's piece of *value*, which all ranks hold; the backward gathers the pieces."""
    return _one(_Split, value, dim, peers)


def reduce_scatter(value: Tensor, dim: int, peers: Peers) -> Tensor:
    """Return this rank's piece of the sum of the ranks' *value*; the backward gathers the pieces."""
    return _one(_ReduceScatter, value, dim, peers)


def fork(value: Tensor, peers: Peers) -> tuple[Tensor, Tensor]:
    """Return *value* twice: for uses that are the same on all ranks, and for uses that differ (see ``enter``)."""
    return _two(_Fork, value, peers)


def gather_fork(piece: Tensor, dim: int, total: int, peers: Peers) -> tuple[Tensor, Tensor]:
    """Return the whole tensor twice: for uses that are the same on all ranks (see ``gather``), and that differ.

    The partial gradients of the second one are summed and split by one reduce-scatter.
    """
    return _two(_GatherFork, piece, dim, total, peers)


def _one(function: Any, *inputs: Any) -> Tensor:
    output: Tensor = function.apply(*inputs)
    return output


def _two(function: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
    first, second = function.apply(*inputs)
    return first, second


class _Enter(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, peers: Peers) -> Tensor:
        ctx.peers = peers
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.peers.all_reduce(grad), None


class _Reduce(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, peers: Peers) -> Tensor:
        return peers.all_reduce(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, piece: Tensor, dim: int, total: int, peers: Peers) -> Tensor:
        ctx.dim, ctx.peers = dim, peers
        return peers.all_gather(piece, dim, total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.peers.piece(grad, ctx.dim), None, None, None


class _Split(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, dim: int, peers: Peers) -> Tensor:
        ctx.dim, ctx.total, ctx.peers = dim, value.shape[dim], peers
        return peers.piece(value, dim).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.peers.all_gather(grad, ctx.dim, ctx.total), None, None


class _ReduceScatter(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, dim: int, peers: Peers) -> Tensor:
        ctx.dim, ctx.total, ctx.peers = dim, value.shape[dim], peers
        return peers.reduce_scatter(value, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.peers.all_gather(grad, ctx.dim, ctx.total), None, None


class _Fork(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, peers: Peers) -> tuple[Tensor, Tensor]:
        ctx.peers = peers
        ctx.set_materialize_grads(False)
        return value.view_as(value), value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, alike: Tensor | None, partial: Tensor | None) -> Any:
        return _sum(alike, None if partial is None else ctx.peers.all_reduce(partial)), None


class _GatherFork(Function):
    @staticmethod
    def forward(ctx: Any, piece: Tensor, dim: int, total: int, peers: Peers) -> tuple[Tensor, Tensor]:
        ctx.dim, ctx.peers = dim, peers
        ctx.set_materialize_grads(False)
        whole = peers.all_gather(piece, dim, total)
        return whole, whole.view_as(whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, alike: Tensor | None, partial: Tensor | None) -> Any:
        mine = None if alike is None else ctx.peers.piece(alike, ctx.dim)
        summed = None if partial is None else ctx.peers.reduce_scatter(partial, ctx.dim)
        return _sum(mine, summed), None, None, None


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other
