"""Convert between two layouts of a parameter's rows over data-parallel ranks: Megatron-FSDP's and DTensor's.

Megatron-FSDP splits the flat bucket that contains a parameter, so a shard has any number of rows, even none. DTensor,
and with it checkpoints and the weight loader, splits every parameter into even chunks. Both split dim 0 of what a
tensor-parallel rank holds, and give the rows to the data-parallel ranks in order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Placement

from nemo_dist.mesh.dtensor import from_local
from nemo_dist.torch_private import StridedShard

_DATA = 0  # the first dim of the mesh that parameters are sharded over; the second one is tensor parallelism


def even_rows(rows: int, ranks: int) -> list[int]:
    """Return how many of *rows* each of *ranks* holds in DTensor's layout: equal chunks, the last short or empty."""
    chunk = -(-rows // ranks)
    return [max(0, min(chunk, rows - rank * chunk)) for rank in range(ranks)]


def even(tensor: Tensor, local: Tensor, mesh: DeviceMesh) -> DTensor:
    """Return the DTensor over *mesh* (data, tensor) of which *local* are this rank's rows.

    *tensor* has the global shape: a plain tensor, or a DTensor over the tensor-parallel ranks.
    """
    data: Placement = Shard(0)
    if not isinstance(tensor, DTensor):
        return from_local(local, mesh[_names(mesh)[_DATA]], [data], like=tensor)
    (across,) = tensor.placements
    if across.is_shard(0) or (isinstance(across, StridedShard) and across.dim == 0):
        data = StridedShard(0, split_factor=mesh.size(1))  # the tensor-parallel ranks split dim 0 first
    return from_local(local, mesh, [data, across], like=tensor)


def tensor_dim(tensor: DTensor) -> int:
    """Return the dim along which *tensor* is sharded over the tensor-parallel ranks."""
    (placement,) = tensor.placements
    dim: int = placement.dim  # type: ignore[attr-defined]
    return dim


def gather_rows(local: Tensor, rows: Sequence[int], group: dist.ProcessGroup | None) -> Tensor:
    """Return the rows of all ranks of *group*, in order; *rows* says how many each has. Collective over *group*."""
    if group is None:
        return local
    longest = torch.zeros(max(rows), *local.shape[1:], dtype=local.dtype, device=local.device)
    longest[: len(local)] = local
    gathered = [torch.empty_like(longest) for _ in rows]
    # Every data-parallel rank takes part, also one that holds no row: it may have rows in the other layout.
    dist.all_gather(gathered, longest, group=group)
    return torch.cat([part[:count] for part, count in zip(gathered, rows, strict=True)])


def _names(mesh: DeviceMesh) -> tuple[str, ...]:
    return mesh.mesh_dim_names or ()


@attrs.frozen(kw_only=True)
class RowSplit:
    """How the rows of one parameter are split: ``rows`` has their number on each data-parallel rank.

    ``whole`` is the parameter on meta before data parallelism, ``own`` the one that Megatron-FSDP made of it.
    """

    rows: Sequence[int]
    whole: Tensor
    own: DTensor


@attrs.frozen(kw_only=True)
class RowLayout:
    """How the rows of all parameters are split, by name; a tied parameter is under each of its names."""

    splits: Mapping[str, RowSplit]
    mesh: DeviceMesh
    group: dist.ProcessGroup | None
    rank: int

    @classmethod
    def of(cls, parameters: Mapping[str, DTensor], whole: Mapping[str, nn.Parameter], mesh: DeviceMesh) -> RowLayout:
        """Ask every data-parallel rank how many rows it holds of each parameter; collective over them."""
        data = mesh[_names(mesh)[_DATA]]
        group = data.get_group() if data.size() > 1 else None
        counts = torch.tensor([len(p.to_local()) for p in parameters.values()], device=mesh.device_type)
        table = [counts]
        if group is not None:
            table = [torch.empty_like(counts) for _ in range(data.size())]
            dist.all_gather(table, counts, group=group)
        splits = {
            name: RowSplit(rows=rows, whole=whole[name], own=parameters[name])
            for name, rows in zip(parameters, torch.stack(table, dim=1).tolist(), strict=True)
        }
        return cls(splits=splits, mesh=mesh, group=group, rank=data.get_local_rank())

    def own_part(self, name: str, source: DTensor) -> Tensor:
        """Return Megatron-FSDP's rows on this rank of the evenly split *source*; a data-parallel collective."""
        rows = self.splits[name].rows
        self._check(name, source)
        whole = gather_rows(source.to_local(), even_rows(sum(rows), len(rows)), self.group)
        part: Tensor = whole.split(list(rows))[self.rank]
        return part

    def _check(self, name: str, source: DTensor) -> None:
        """Raise RuntimeError when this rank holds other rows than DTensor's layout: a gather would misplace them."""
        rows = self.splits[name].rows
        wanted, found = even_rows(sum(rows), len(rows))[self.rank], len(source.to_local())
        if found != wanted:
            raise RuntimeError(f"{name} should have {wanted} rows on data-parallel rank {self.rank} (got {found})")

    def even_part(self, name: str, own: DTensor) -> DTensor:
        """Return the evenly split DTensor of which this rank holds *own*; a data-parallel collective."""
        split = self.splits[name]
        whole = gather_rows(own.to_local(), split.rows, self.group)
        # Cloned, because a view would keep the whole tensor alive.
        local = whole.split(even_rows(len(whole), len(split.rows)))[self.rank].clone()
        return even(split.whole, local, self.mesh)

    def correct(self, name: str, own: Any) -> None:
        """Replace ``full_tensor`` of *own*, a parameter or a gradient, by a correct one, and refuse ``redistribute``.

        torch's methods assume even chunks, and would silently return rows in the wrong places. The new ``full_tensor``
        is collective too, but not differentiable. Tensors derived from *own* (``detach()``, a moment of the optimizer)
        have torch's methods again.
        """

        def full_tensor(*, grad_placements: Any = None) -> Tensor:
            return self.even_part(name, own.detach()).full_tensor()

        def redistribute(*args: Any, **kwargs: Any) -> DTensor:
            raise RuntimeError(
                f"{name} is cut at rows of Megatron-FSDP's choice, which DTensor.redistribute would misplace; call "
                "full_tensor() on it, or take the canonical state that runtime.save writes"
            )

        own.full_tensor, own.redistribute = full_tensor, redistribute

    def to_even(self, state: dict[str, Tensor]) -> None:
        """Convert tensors of *state* in the layout of parameters to even chunks; collective, in their order."""
        for name, tensor in self._like_parameters(state):
            state[name] = self.even_part(name, tensor)

    def from_even(self, state: dict[str, Tensor]) -> None:
        """Convert tensors of *state* in even chunks to the layout of parameters; collective, in their order."""
        for name, tensor in self._like_parameters(state):
            own = self.splits[name].own
            part = self.own_part(name, tensor).clone()
            state[name] = from_local(part, own.device_mesh, own.placements, like=own)

    def _like_parameters(self, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Any]]:
        for name, tensor in list(state.items()):
            if name in self.splits and isinstance(tensor, DTensor) and tensor.shape == self.splits[name].own.shape:
                yield name, tensor
