"""Compare the copies of parameters and gradients that ranks hold whole, which must be equal bit for bit.

A plan that forgets a parameter, a kernel that is not deterministic, or ranks that loaded different files make replicas
drift apart in silence. Each rank sums the bits of every tensor to one int64, and one all-reduce per axis of the mesh
tells whether the sums are equal along it. No tensor is sent, and only a difference costs more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from nemo_dist.errors import RankError
from nemo_dist.mesh.dtensor import digest
from nemo_dist.planning.mesh_plan import Role
from nemo_dist.planning.validation import integer

if TYPE_CHECKING:
    from nemo_dist.mesh.mesh_context import MeshContext

FIRST_STEPS = 2
_NAMED = 5  # differing tensors that an error names


def _from_zero(_: object, __: object, value: Any) -> None:
    integer("check_replicas", value, 0)


@attrs.define(eq=False)
class ReplicaCheck:
    """Compares replicas in the first steps and, with ``every`` above 0, in every that many steps; 0 is never at all.

    Of a loop that runs its own backwards a step is what is clipped or stepped without a ``forward_backward`` before;
    ``counted`` says whether the one that is now has been counted.
    """

    every: int | None = attrs.field(default=None, validator=attrs.validators.optional(_from_zero))
    step: int = 0
    counted: bool = False

    @property
    def due(self) -> bool:
        """Whether the step that begins now is one of those; counts it."""
        self.step += 1
        self.counted = True
        if self.every == 0:
            return False
        return self.step <= FIRST_STEPS or (self.every is not None and self.step % self.every == 0)

    @property
    def due_in_own_loop(self) -> bool:
        """Whether the step whose gradients are used now is one of those, and not counted yet."""
        return not self.counted and self.due

    def end_step(self) -> None:
        """Count what is used from now on as another step."""
        self.counted = False


def check_replicas(parameters: Iterable[tuple[str, Tensor]], mesh: MeshContext) -> None:
    """Raise RankError on every rank when a replica of a parameter or of its gradient differs between ranks.

    Collective over all ranks of *mesh*: one all-reduce of two int64 per tensor along every axis, and one of a flag.
    """
    found = [line for _, lines in differences(parameters, mesh) for line in lines]
    flag = torch.tensor([bool(found)], dtype=torch.int32, device=mesh.device)
    if mesh.device_mesh is not None and dist.is_initialized():
        for name in mesh.wide():
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=mesh.group(name))
    if not bool(flag):
        return
    more = f"\n- and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    lines = [f"- {line}" for line in found[:_NAMED]] or ["- those of other ranks; see their errors"]
    raise RankError(
        "replicas that must be equal on all ranks differ:\n" + "\n".join(lines) + more + "\nthe training has gone "
        "wrong before this point: a plan that forgets a parameter, a kernel that is not deterministic, or other weights"
    )


def differences(parameters: Iterable[tuple[str, Tensor]], mesh: MeshContext) -> Iterator[tuple[str, list[str]]]:
    """Yield every axis of *mesh* with the replicas that differ along it, one line each; collective over the ranks."""
    tensors = list(_tensors(parameters))
    for axis in _axes(mesh):
        held = {what: tensor for what, tensor in tensors if _is_replicated(tensor, axis, mesh)}
        yield axis, _along(axis, held, mesh) if held else []


def _tensors(parameters: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in parameters:
        yield name, parameter.detach()
        if parameter.requires_grad:
            grad = parameter.grad
            yield f"the gradient of {name}", parameter.detach().new_zeros(0) if grad is None else grad.detach()


def _axes(mesh: MeshContext) -> list[str]:
    """Return the axes along which ranks hold the same modules."""
    if mesh.device_mesh is None:
        return []
    own = mesh.device_mesh.mesh_dim_names or ()
    return [name for name in own if mesh.size(name) > 1 and not mesh.roles.get(name, Role(0)) & Role.LAYERS]


def _is_replicated(tensor: Tensor, axis: str, mesh: MeshContext) -> bool:
    """Whether every rank along *axis* has the same local tensor of *tensor*."""
    if not isinstance(tensor, DTensor):
        return True
    dense = () if mesh.device_mesh is None else mesh.device_mesh.mesh_dim_names or ()
    for name, placement in zip(tensor.device_mesh.mesh_dim_names or (), tensor.placements, strict=True):
        parts = mesh.flattened.get(name, (name,))
        parts = tuple("dp" if "dp" in dense and part == "dp_shard" else part for part in parts)
        if not set(parts) & set(dense):
            return False  # on a mesh of another view, such as that of experts: which of these ranks agree is not known
        if axis in parts and not isinstance(placement, Replicate):
            return False
    return all(isinstance(placement, Replicate | Shard) or placement.is_shard() for placement in tensor.placements)


def digests_on(device: torch.device, tensors: Iterable[Tensor]) -> Tensor:
    """Return the digests of *tensors* on *device*; shards may be offloaded, and adapters beside them are not."""
    return torch.stack([digest(tensor).to(device) for tensor in tensors])


def _along(axis: str, held: Mapping[str, Tensor], mesh: MeshContext) -> list[str]:
    group = mesh.group(axis)
    digests = digests_on(mesh.device, held.values())
    bounds = torch.cat([digests, ~digests])  # the greatest of ~x is ~ of the least x
    dist.all_reduce(bounds, dist.ReduceOp.MAX, group=group)
    highest, lowest = bounds[: len(digests)], ~bounds[len(digests) :]
    if bool((highest == lowest).all()):
        return []
    everywhere = [torch.empty_like(digests) for _ in range(mesh.size(axis))]
    dist.all_gather(everywhere, digests, group=group)
    ranks = dist.get_process_group_ranks(group) if group is not None else [0]
    lines = []
    for index, what in enumerate(held):
        odd = [rank for rank, found in zip(ranks, everywhere, strict=True) if found[index] != everywhere[0][index]]
        if odd:
            lines.append(f"{what}: ranks {odd} differ from rank {ranks[0]} along {axis!r}")
    return lines
