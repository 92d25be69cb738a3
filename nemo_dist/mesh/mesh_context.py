"""The live mesh: a MeshPlan realised on the ranks of a process group."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING

import attrs
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nemo_dist.errors import RankError
from nemo_dist.mesh.store_consensus import compare
from nemo_dist.planning.mesh_plan import View

if TYPE_CHECKING:
    from nemo_dist.setup.setup import DistributedSetup

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
FLATTENED: Mapping[str, tuple[str, ...]] = {
    "dp": ("dp_replicate", "dp_shard"),
    "dp_shard_cp": ("dp_shard", "cp"),
    "dp_cp": ("dp_replicate", "dp_shard", "cp"),
}


@attrs.frozen
class DistEnv:
    """This process in its group: its rank in all and on this machine, and the torch ``device`` it uses."""

    backend: str
    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0


def initialize_distributed(backend: str | None = None, timeout_minutes: float = 10) -> DistEnv:
    """Join the process group, under torchrun or alone, and return this process's place in it.

    ``backend``: "nccl", "gloo", or None for what the machine has. ``timeout_minutes``: the limit of every collective. A
    process group that exists already is taken as it is.

    Raises RuntimeError for "nccl" without CUDA.
    """
    cuda = torch.cuda.is_available()
    if backend is not None and "nccl" in backend and not cuda:
        raise RuntimeError(f"backend {backend!r} needs CUDA, and this machine has none; use 'gloo'")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if cuda and backend != "gloo" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        chosen = backend or ("cpu:gloo,cuda:nccl" if cuda else "gloo")
        timeout = timedelta(minutes=timeout_minutes)
        if "RANK" in os.environ:
            dist.init_process_group(chosen, timeout=timeout)
        else:
            dist.init_process_group(chosen, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return DistEnv(
        backend=dist.get_backend(),
        rank=dist.get_rank(),
        local_rank=local_rank,
        world_size=dist.get_world_size(),
        device=device,
    )


@attrs.frozen(eq=False)
class MeshContext:
    """The live meshes of a setup.

    ``device_mesh`` has the axes ``pp, dp_replicate, dp_shard, cp, tp`` (or the user's own), and the flattened names
    ``dp``, ``dp_shard_cp`` and ``dp_cp``. ``views`` are the meshes that plugins added, by name, and ``flattened`` says
    which axes a flattened name of any of them stands for. Sizes are read from the live mesh, 1 where an axis is absent.
    """

    device_mesh: DeviceMesh | None = None
    views: Mapping[str, DeviceMesh] = attrs.field(factory=dict)
    flattened: Mapping[str, tuple[str, ...]] = attrs.field(default=FLATTENED)

    @classmethod
    def realise(cls, setup: DistributedSetup) -> MeshContext:
        """Make the live mesh of *setup*; collective over all ranks of the process group.

        Raises RankError when the ranks built different setups, or when the group has another size than was planned.
        """
        if not dist.is_initialized():
            raise RankError("there is no process group to lay the mesh over; call initialize_distributed() first")
        compare("the setup", setup.describe())
        plan = setup.plan
        if setup.ranks is None and plan.world_size != dist.get_world_size():
            raise RankError(
                f"the setup is planned for {plan.world_size} ranks, but the process group has {dist.get_world_size()}; "
                "build it with that world_size"
            )
        ranks = torch.tensor(setup.ranks if setup.ranks is not None else range(plan.world_size), dtype=torch.int)
        device_type = setup.device_type or default_device_type()
        dense = _live(plan.dense, ranks, device_type)
        views = {view.name: _live(view, ranks, device_type) for view in plan.views}
        flattened = {name: axes for view in (plan.dense, *plan.views) for name, axes in view.flattened.items()}
        context = cls(dense, views, flattened)
        if setup.timeout_minutes is not None:
            _limit(context, timedelta(minutes=setup.timeout_minutes))
        return context

    @classmethod
    def from_meshes(cls, device_mesh: DeviceMesh | None, moe_mesh: DeviceMesh | None = None) -> MeshContext:
        """Wrap the user's own meshes; raise ValueError for an axis name that no plan has."""
        for what, mesh, known in (
            ("device_mesh", device_mesh, (*AXES, "dp")),
            ("moe_mesh", moe_mesh, ("pp", "ep_shard", "ep")),
        ):
            if mesh is None:
                continue
            if not isinstance(mesh, DeviceMesh):
                raise TypeError(f"{what} must be a torch DeviceMesh (got {type(mesh).__name__})")
            names = mesh.mesh_dim_names or ()
            foreign = [name for name in names if name not in known]
            if foreign or not names:
                raise ValueError(f"{what} has the axes {foreign or 'without names'}; valid names: {', '.join(known)}")
            if "dp" in names and {"dp_shard", "dp_replicate"} & set(names):
                raise ValueError(
                    f"{what} has the axes {names}; 'dp' stands for dp_replicate x dp_shard, so name it or them"
                )
            _refuse_disorder(what, mesh)
        return cls(device_mesh, {} if moe_mesh is None else {"moe": moe_mesh})

    @property
    def moe_mesh(self) -> DeviceMesh | None:
        """The mesh of the experts, with the axes ``ep_shard, ep``; None when ep is 1."""
        moe = self.views.get("moe")
        return None if moe is None else _sliced(moe, ["ep_shard", "ep"])

    def __getitem__(self, names: str | tuple[str, ...]) -> DeviceMesh:
        """Return the submesh of an axis or flattened name, or the mesh over several of them, one dim each."""
        wanted = (names,) if isinstance(names, str) else names
        for mesh in self._meshes():
            present = [self._present(mesh, name) for name in wanted]
            if all(present):
                axes = [self._axis(mesh, name, axes) for name, axes in zip(wanted, present, strict=True)]
                return _sliced(mesh, axes)
        raise KeyError(f"the mesh has no axis {names!r} (axes: {[mesh.mesh_dim_names for mesh in self._meshes()]})")

    def size(self, name: str) -> int:
        """Return the number of ranks along an axis or flattened name; 1 where it is absent."""
        for mesh in self._meshes():
            present = self._present(mesh, name)
            if present:
                own = mesh.mesh_dim_names or ()
                return math.prod(mesh.size(own.index(axis)) for axis in present)
        return 1

    def group(self, name: str) -> dist.ProcessGroup | None:
        """Return the process group of this rank along *name*, or None where it has only this rank."""
        return self[name].get_group() if self.size(name) > 1 else None

    def rank(self, name: str) -> int:
        """Return the coordinate of this rank along *name*."""
        return self[name].get_local_rank() if self.size(name) > 1 else 0

    @property
    def device(self) -> torch.device:
        """The torch device of this rank."""
        kind = self.device_mesh.device_type if self.device_mesh is not None else default_device_type()
        return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)

    @property
    def holds_this_rank(self) -> bool:
        """Whether this rank has a place in the mesh."""
        return self.device_mesh is None or self.device_mesh.get_coordinate() is not None

    pp_size = property(lambda self: self.size("pp"), doc="Number of pipeline ranks.")
    tp_size = property(lambda self: self.size("tp"), doc="Number of tensor-parallel ranks.")
    cp_size = property(lambda self: self.size("cp"), doc="Number of context-parallel ranks.")
    ep_size = property(lambda self: self.size("ep"), doc="Number of expert-parallel ranks.")
    dp_size = property(lambda self: self.size("dp"), doc="Number of different batches in a step.")
    dp_replicate_size = property(lambda self: self.size("dp_replicate"), doc="Number of replicas of a shard (HSDP).")
    dp_shard_size = property(
        lambda self: self.dp_size // self.dp_replicate_size,
        doc="Number of ranks that share one copy of the parameters.",
    )

    def _meshes(self) -> tuple[DeviceMesh, ...]:
        dense = () if self.device_mesh is None else (self.device_mesh,)
        return (*dense, *self.views.values())

    def _present(self, mesh: DeviceMesh, name: str) -> tuple[str, ...]:
        """Return the axes of *mesh* that make up *name*, those of size 1 left out where others remain.

        The ``dp`` of a user's own mesh stands for dp_shard.
        """
        own = mesh.mesh_dim_names or ()
        alias = {"dp_shard": "dp"} if "dp" in own else {}
        parts = [alias.get(part, part) for part in self.flattened.get(name, (name,))]
        present = tuple(dict.fromkeys(part for part in parts if part in own))
        return tuple(axis for axis in present if mesh.size(own.index(axis)) > 1) or present[:1]

    def _axis(self, mesh: DeviceMesh, name: str, present: tuple[str, ...]) -> str:
        """Return the name under which *mesh* has *name*, made by flattening where it spans several axes."""
        if len(present) > 1:
            flatten(mesh, present, name)
            return name
        return present[0]


def _refuse_disorder(what: str, mesh: DeviceMesh) -> None:
    """Refuse a mesh whose ranks do not ascend: torch orders a process group by rank, but a mesh as it was given."""
    for dim, name in enumerate(mesh.mesh_dim_names or ()):
        if (mesh.mesh.diff(dim=dim) < 0).any():
            raise ValueError(
                f"{what} {mesh.mesh.tolist()} has ranks in descending order along {name!r}, but torch's process groups "
                "are in ascending order; lay the ranks out so that they ascend along every axis"
            )


def in_order(mesh: DeviceMesh) -> DeviceMesh:
    """Return the user's *mesh* with its axes in the order of a plan: a new mesh where they were not, so collective.

    torch composes shardings only on meshes in which the data axes lie outside of the tensor-parallel one.
    """
    names = mesh.mesh_dim_names or ()
    order = sorted(names, key=lambda name: AXES.index("dp_shard" if name == "dp" else name))
    if tuple(order) == names:
        return mesh
    if mesh.mesh.numel() != dist.get_world_size():
        raise ValueError(
            f"device_mesh has the axes {names} over {mesh.mesh.numel()} of the {dist.get_world_size()} ranks; a mesh "
            f"over some ranks must have its axes in the order {tuple(order)}"
        )
    ranks = mesh.mesh.permute([names.index(name) for name in order])
    return DeviceMesh(mesh.device_type, ranks, mesh_dim_names=tuple(order))


def default_device_type() -> str:
    """Return "cuda" where the process group can use it, else "cpu"."""
    nccl = dist.is_initialized() and "nccl" in str(dist.get_backend_config())
    return "cuda" if torch.cuda.is_available() and (nccl or not dist.is_initialized()) else "cpu"


def flatten(mesh: DeviceMesh, axes: tuple[str, ...], name: str) -> DeviceMesh:
    """Return the 1-D mesh over *axes*, made on first use; torch has no public name for this yet."""
    root = mesh._get_root_mesh()
    made = root._flatten_mapping.get(name)
    return mesh[axes]._flatten(name) if made is None else made


def _sliced(mesh: DeviceMesh, names: list[str]) -> DeviceMesh:
    """Return the submesh over axes and flattened names of *mesh*."""
    flattened = mesh._get_root_mesh()._flatten_mapping
    if len(names) == 1:
        return flattened[names[0]] if names[0] in flattened else mesh[names[0]]
    with warnings.catch_warnings():  # torch means to change how a flattened name is sliced, not what it means
        warnings.filterwarnings("ignore", "Slicing a flattened dim")
        return mesh[tuple(names)]


def _live(view: View, ranks: torch.Tensor, device_type: str) -> DeviceMesh:
    shape = tuple(axis.size for axis in view.axes)
    names = tuple(axis.name for axis in view.axes)
    if ranks.numel() == dist.get_world_size() and torch.equal(ranks, torch.arange(ranks.numel(), dtype=ranks.dtype)):
        mesh = init_device_mesh(device_type, shape, mesh_dim_names=names)
    else:
        mesh = DeviceMesh(device_type, ranks.reshape(shape), mesh_dim_names=names)
    for name, axes in view.flattened.items():
        flatten(mesh, tuple(axes), name)  # every rank makes the groups now, in this order
    return mesh


def _limit(context: MeshContext, timeout: timedelta) -> None:
    """Set the time limit of every collective on the mesh; torch has no public name for this yet."""
    for mesh in (context.device_mesh, *context.views.values()):
        if mesh is not None and mesh.get_coordinate() is not None:
            for group in mesh.get_all_groups():
                dist.distributed_c10d._set_pg_timeout(timeout, group)
