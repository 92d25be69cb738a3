"""The live mesh: a MeshPlan realised on the ranks of a process group."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from datetime import timedelta

import attrs
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nemo_dist.errors import RankError
from nemo_dist.mesh.live_groups import live
from nemo_dist.mesh.process_group import (
    default_device_type,
    make_group,
    refuse_part_of_bound,
    require_process_group,
    timeout_of_group,
)
from nemo_dist.planning.mesh_plan import DENSE_AXES, FLATTENED, MeshPlan, Role, View

_DP = "dp"  # the axis of a user's own mesh that replaces dp_replicate x dp_shard
_EXPERT_AXES = ("ep_shard", "ep")


@attrs.frozen(eq=False)
class MeshContext:
    """The live device meshes of a setup.

    ``device_mesh`` has the axes ``pp, dp_replicate, dp_shard, cp, tp`` (or the user's own), and the flattened names
    ``dp``, ``dp_shard_cp`` and ``dp_cp``. ``views`` are the meshes that plugins added, by name. ``flattened`` maps each
    flattened name of any mesh to its axes, and ``roles`` maps each axis of ``device_mesh`` to what its ranks split.
    Sizes are read from the live mesh; an axis that does not exist has size 1. A parameter called ``along`` is an axis,
    a flattened name, or a :class:`~nemo_dist.Role`, which means all axes of ``device_mesh`` with that role.
    """

    device_mesh: DeviceMesh | None = None
    views: Mapping[str, DeviceMesh] = attrs.field(factory=dict)
    flattened: Mapping[str, tuple[str, ...]] = attrs.field(default=FLATTENED)
    roles: Mapping[str, Role] = attrs.field(default=DENSE_AXES)

    def __deepcopy__(self, memo: object) -> MeshContext:
        """Return this object: process groups are not copied, and a copy of a model is on the same ranks."""
        return self

    @classmethod
    def realise(
        cls,
        plan: MeshPlan,
        ranks: Sequence[int] | None = None,
        device_type: str | None = None,
        timeout_minutes: float | None = None,
    ) -> MeshContext:
        """Return the device meshes of *plan* over *ranks* (None: all); collective over the process group.

        The same arguments give the same meshes for as long as the process group lives, as process groups have
        threads, connections and buffers that only its end gives back. ``device_type``: "cpu" or "cuda"; None is
        what the process group can use. ``timeout_minutes``: the timeout of every collective on the mesh; None
        is that of the process group. Raises RankError without a process group, when *ranks* is None and the
        group has another size than the plan, or when they are some of a group that is bound to a device.
        """
        require_process_group()
        if ranks is None and plan.world_size != dist.get_world_size():
            raise RankError(
                f"the setup is planned for {plan.world_size} ranks, but the process group has {dist.get_world_size()}; "
                "build it with that world_size"
            )
        chosen = tuple(range(plan.world_size) if ranks is None else ranks)
        refuse_part_of_bound(len(chosen))
        kind = device_type or default_device_type()
        timeout = timeout_of_group() if timeout_minutes is None else timedelta(minutes=timeout_minutes)
        return live.kept((plan, chosen, kind, timeout), lambda: cls._create(plan, chosen, kind, timeout))

    @classmethod
    def _create(cls, plan: MeshPlan, ranks: tuple[int, ...], kind: str, timeout: timedelta | None) -> MeshContext:
        members = torch.tensor(ranks, dtype=torch.int, device="cpu")
        context = cls(
            device_mesh=_live(plan.dense, members, kind),
            views={view.name: _live(view, members, kind) for view in plan.views},
            flattened={name: axes for view in (plan.dense, *plan.views) for name, axes in view.flattened.items()},
            roles={axis.name: axis.role for axis in plan.dense.axes},
        )
        if len(ranks) < dist.get_world_size():
            make_group(tuple(sorted(ranks)))
        if timeout is not None:
            _limit(context, timeout)
        return context

    @classmethod
    def from_meshes(cls, device_mesh: DeviceMesh | None, moe_mesh: DeviceMesh | None = None) -> MeshContext:
        """Wrap the user's own meshes.

        Raises TypeError for anything but a DeviceMesh; ValueError for an axis name that no plan has, for ``dp`` beside
        ``dp_shard`` or ``dp_replicate``, and for ranks that do not ascend along every axis; RankError for some of the
        ranks of a process group that is bound to a device.
        """
        for what, mesh, known in (
            ("device_mesh", device_mesh, (*DENSE_AXES, _DP)),
            ("moe_mesh", moe_mesh, ("pp", *_EXPERT_AXES)),
        ):
            if mesh is None:
                continue
            if not isinstance(mesh, DeviceMesh):
                raise TypeError(f"{what} must be a torch DeviceMesh (got {type(mesh).__name__})")
            names = mesh.mesh_dim_names or ()
            foreign = [name for name in names if name not in known]
            if foreign or not names:
                raise ValueError(f"{what} has the axes {foreign or 'without names'}; valid names: {', '.join(known)}")
            if _DP in names and {"dp_shard", "dp_replicate"} & set(names):
                raise ValueError(
                    f"{what} has the axes {names}; 'dp' stands for dp_replicate x dp_shard, so name it or them"
                )
            _refuse_disorder(what, mesh)
        if device_mesh is not None:
            refuse_part_of_bound(device_mesh.mesh.numel())
        return cls(
            device_mesh, {} if moe_mesh is None else {"experts": moe_mesh}, roles={**DENSE_AXES, _DP: Role.BATCH}
        )

    @property
    def moe_mesh(self) -> DeviceMesh | None:
        """The submesh of the experts, with the axes ``ep_shard, ep``; None when no view has them."""
        view = next((mesh for mesh in self.views.values() if all(self._present(mesh, a) for a in _EXPERT_AXES)), None)
        return None if view is None else _sliced(view, list(_EXPERT_AXES))

    def __getitem__(self, along: str | Role | tuple[str, ...]) -> DeviceMesh:
        """Return the 1-D submesh *along* an axis, flattened name or role; for a tuple of names, one dim each.

        Raises KeyError when no mesh has them.
        """
        wanted = along if isinstance(along, tuple) else (self._name(along),)
        for mesh in self._meshes():
            present = [self._present(mesh, name) for name in wanted]
            if all(present):
                axes = [self._axis(mesh, name, axes) for name, axes in zip(wanted, present, strict=True)]
                return _sliced(mesh, axes)
        raise KeyError(f"the mesh has no axis {along!r} (axes: {[mesh.mesh_dim_names for mesh in self._meshes()]})")

    def size(self, along: str | Role) -> int:
        """Return the number of ranks *along*; 1 when there is no such axis."""
        name = self._name(along)
        for mesh in self._meshes():
            present = self._present(mesh, name)
            if present:
                own = mesh.mesh_dim_names or ()
                return math.prod(mesh.size(own.index(axis)) for axis in present)
        return 1

    def group(self, along: str | Role) -> dist.ProcessGroup | None:
        """Return the process group *along* that contains this rank, or None when its size is 1."""
        return self[along].get_group() if self.size(along) > 1 else None

    def rank(self, along: str | Role) -> int:
        """Return the coordinate of this rank *along*; 0 when the size is 1."""
        return self[along].get_local_rank() if self.size(along) > 1 else 0

    def wide(self) -> dict[str, int]:
        """Return the axes of size above 1 in all meshes, and their sizes."""
        names = dict.fromkeys(name for mesh in self._meshes() for name in mesh.mesh_dim_names or ())
        return {name: size for name in names if (size := self.size(name)) > 1}

    @property
    def device(self) -> torch.device:
        """The torch device that this process uses."""
        kind = self.device_mesh.device_type if self.device_mesh is not None else default_device_type()
        return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)

    @property
    def holds_this_rank(self) -> bool:
        """Whether this rank is part of the device mesh; True when there is no mesh."""
        return self.device_mesh is None or self.device_mesh.get_coordinate() is not None

    pp_size = property(lambda self: self.size("pp"), doc="Number of pipeline ranks.")
    pp_enabled = property(lambda self: self.pp_size > 1, doc="Whether there are several pipeline ranks.")
    tp_size = property(lambda self: self.size("tp"), doc="Number of tensor-parallel ranks.")
    cp_size = property(lambda self: self.size("cp"), doc="Number of context-parallel ranks.")
    ep_size = property(lambda self: self.size("ep"), doc="Number of expert-parallel ranks.")
    dp_size = property(lambda self: self.size("dp"), doc="Number of different batches in a step.")
    dp_replicate_size = property(lambda self: self.size("dp_replicate"), doc="Number of replicas of a shard (HSDP).")
    dp_shard_size = property(
        lambda self: self.dp_size // self.dp_replicate_size,
        doc="Number of ranks that share one copy of the parameters.",
    )

    def _name(self, along: str | Role) -> str:
        """Return the axis or flattened name that *along* means; "" for a role that no axis has."""
        if isinstance(along, str):
            return along
        own = () if self.device_mesh is None else self.device_mesh.mesh_dim_names or ()
        axes = tuple(axis for axis in own if self.roles.get(axis, Role(0)) & along)
        if len(axes) == 1:
            return axes[0]
        # Axes of one role always have a flattened name: all ranks created its process groups together with the mesh.
        return next(name for name in self.flattened if self._parts(own, name) == axes) if axes else ""

    def _meshes(self) -> tuple[DeviceMesh, ...]:
        dense = () if self.device_mesh is None else (self.device_mesh,)
        return (*dense, *self.views.values())

    def _present(self, mesh: DeviceMesh, name: str) -> tuple[str, ...]:
        """Return the axes of *mesh* that *name* consists of, without those of size 1 unless all are.

        In a user's own mesh that has ``dp``, it replaces ``dp_shard``.
        """
        own = mesh.mesh_dim_names or ()
        present = self._parts(own, name)
        return tuple(axis for axis in present if mesh.size(own.index(axis)) > 1) or present[:1]

    def _parts(self, own: Sequence[str], name: str) -> tuple[str, ...]:
        """Return those of the axes *own* that *name* consists of."""
        alias = {"dp_shard": _DP} if _DP in own else {}
        parts = [alias.get(part, part) for part in self.flattened.get(name, (name,))]
        return tuple(dict.fromkeys(part for part in parts if part in own))

    def _axis(self, mesh: DeviceMesh, name: str, present: tuple[str, ...]) -> str:
        """Return the name by which to slice *name* out of *mesh*, flattening its axes first when there are several."""
        if len(present) > 1:
            flatten(mesh, present, name)
            return name
        return present[0]


def _refuse_disorder(what: str, mesh: DeviceMesh) -> None:
    """Raise ValueError for a mesh whose ranks do not ascend along every axis.

    torch sorts the ranks of a process group, so a rank in a group would not be the coordinate in the mesh.
    """
    for dim, name in enumerate(mesh.mesh_dim_names or ()):
        if (mesh.mesh.diff(dim=dim) < 0).any():
            raise ValueError(
                f"{what} {mesh.mesh.tolist()} has ranks in descending order along {name!r}, but torch's process groups "
                "are in ascending order; lay the ranks out so that they ascend along every axis"
            )


def in_order(mesh: DeviceMesh) -> DeviceMesh:
    """Return *mesh* with its axes in the order of a plan; collective if they were not, as that creates a new mesh.

    torch composes shardings only where the data-parallel axes lie outside the tensor-parallel one. Raises ValueError
    for a mesh in another order that does not cover all ranks.
    """
    names = mesh.mesh_dim_names or ()
    order = sorted(names, key=lambda name: list(DENSE_AXES).index("dp_shard" if name == _DP else name))
    if tuple(order) == names:
        return mesh
    if mesh.mesh.numel() != dist.get_world_size():
        raise ValueError(
            f"device_mesh has the axes {names} over {mesh.mesh.numel()} of the {dist.get_world_size()} ranks; a mesh "
            f"over some ranks must have its axes in the order {tuple(order)}"
        )
    ranks = mesh.mesh.permute([names.index(name) for name in order])
    return DeviceMesh(mesh.device_type, ranks, mesh_dim_names=tuple(order))


def flatten(mesh: DeviceMesh, axes: tuple[str, ...], name: str) -> DeviceMesh:
    """Return the 1-D mesh that flattens *axes* into *name*, created on first use; torch has no public API for it."""
    root = mesh._get_root_mesh()
    made = root._flatten_mapping.get(name)
    return mesh[axes]._flatten(name) if made is None else made


def _sliced(mesh: DeviceMesh, names: list[str]) -> DeviceMesh:
    """Return the submesh of *mesh* over *names*, which are axes or flattened names."""
    flattened = mesh._get_root_mesh()._flatten_mapping
    if len(names) == 1:
        return flattened[names[0]] if names[0] in flattened else mesh[names[0]]
    with warnings.catch_warnings():  # torch announces another way to slice flattened names; the result stays the same
        warnings.filterwarnings("ignore", "Slicing a flattened dim")
        return mesh[tuple(names)]


def _live(view: View, ranks: torch.Tensor, device_type: str) -> DeviceMesh:
    shape = tuple(axis.size for axis in view.axes)
    names = tuple(axis.name for axis in view.axes)
    if ranks.numel() == dist.get_world_size() and torch.equal(
        ranks, torch.arange(ranks.numel(), dtype=ranks.dtype, device="cpu")
    ):
        mesh = init_device_mesh(device_type, shape, mesh_dim_names=names)
    else:
        mesh = DeviceMesh(device_type, ranks.reshape(shape), mesh_dim_names=names)
    for name, axes in view.flattened.items():
        flatten(mesh, tuple(axes), name)  # creating groups is collective: all ranks do it now, in the same order
    return mesh


def _limit(context: MeshContext, timeout: timedelta) -> None:
    """Set the timeout of every process group of the mesh, flattened ones too; torch has no public API for this yet."""
    for mesh in context._meshes():
        if mesh.get_coordinate() is not None:
            for part in (mesh, *mesh._get_root_mesh()._flatten_mapping.values()):
                for group in part.get_all_groups():
                    dist.distributed_c10d._set_pg_timeout(timeout, group)
