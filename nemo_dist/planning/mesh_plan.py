"""Arrange ranks along the axes of the mesh, with integers only: no torch and no process group.

======================  ==============================  =============================================
axis, outermost first   size                            ranks that differ only in it
======================  ==============================  =============================================
``pp``                  ``pp_size``                     hold different layers
``dp_replicate``        ``dp_replicate_size``           hold equal shards, read different batches
``dp_shard``            ``dp_size/dp_replicate_size``   hold different shards, read different batches
``cp``                  ``cp_size``                     read different parts of the same sequences
``tp``                  ``tp_size``                     hold different parts of the same matrices
======================  ==============================  =============================================

An axis of a third-party plugin that declares a :class:`Role` is placed next to our axes of that role: after ``pp``,
before ``dp_replicate``, after ``cp`` or after ``tp``. Ranks run from 0 to ``world_size - 1`` in row-major order: the
last axis of a view changes fastest, as in torch's ``init_device_mesh``. A plugin may add views: other factorisations of
the same ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import attrs

from nemo_dist.errors import TopologyError
from nemo_dist.planning.sizes import ParallelismSizes
from nemo_dist.planning.validation import integer, near
from nemo_dist.planning.views import (
    DENSE,
    Axis,
    Role,
    View,
    coverage_problems,
    layout_problems,
    missing_axes,
    unknown_axis,
)

__all__ = ["DENSE", "DENSE_AXES", "FLATTENED", "Axis", "MeshPlan", "Role", "View"]

# The axes that every plan has, outermost first, and what the ranks along each split between them.
DENSE_AXES = {
    "pp": Role.LAYERS,
    "dp_replicate": Role.BATCH,
    "dp_shard": Role.BATCH,
    "cp": Role.SEQUENCE,
    "tp": Role.PARAMETERS,
}
# Flattened names of consecutive dense axes; a third-party axis is flattened together with the axes of its role.
FLATTENED = {
    "dp": ("dp_replicate", "dp_shard"),
    "dp_shard_cp": ("dp_shard", "cp"),
    "dp_cp": ("dp_replicate", "dp_shard", "cp"),
}


def _dense(sizes: ParallelismSizes, world_size: int) -> View:
    """Return the dense view of *sizes*: our five axes, with each third-party axis next to those of its role."""
    replicate = sizes.dp_replicate_size or 1
    shard = max(1, sizes.dp(world_size) // replicate)
    ours = (sizes.pp_size, replicate, shard, sizes.cp_size, sizes.tp_size)
    axes = [Axis(name, size, role) for (name, role), size in zip(DENSE_AXES.items(), ours, strict=True)]
    for name, role in sizes.roles.items():
        places = [place for place, axis in enumerate(axes) if axis.role is role]
        axes.insert(places[0] if role is Role.BATCH else places[-1] + 1, Axis(name, sizes.extra[name], role))
    batch, sequence = _named(axes, Role.BATCH), _named(axes, Role.SEQUENCE)
    flattened = {"dp": batch, "dp_shard_cp": ("dp_shard", *sequence), "dp_cp": (*batch, *sequence)}
    if len(batch) > 2:
        flattened["replicas"] = batch[:-1]  # ranks that hold equal shards and read different batches
    others = (_named(axes, role) for role in (Role.LAYERS, Role.SEQUENCE, Role.PARAMETERS)) if sizes.roles else ()
    return View(DENSE, axes, flattened | {"_".join(run): run for run in others if len(run) > 1})


def _named(axes: Iterable[Axis], role: Role) -> tuple[str, ...]:
    return tuple(axis.name for axis in axes if axis.role is role)


def _tuple(views: Iterable[View]) -> tuple[View, ...]:
    return tuple(views)


@attrs.frozen
class MeshPlan:
    """The resolved mesh: how many ranks there are and how each view arranges them; frozen, hashable and picklable.

    Make one with :meth:`resolve`. Queries are arithmetic on one rank; they cost no more than the ranks that they
    return.
    """

    world_size: int
    dense: View
    views: tuple[View, ...] = attrs.field(default=(), converter=_tuple)

    def __attrs_post_init__(self) -> None:
        integer("world_size", self.world_size)
        if problems := coverage_problems(self._all, self.world_size) + layout_problems(self._all):
            raise TopologyError(problems)

    @classmethod
    def resolve(cls, sizes: ParallelismSizes, world_size: int, views: Iterable[View] = ()) -> MeshPlan:
        """Return the plan of *sizes* over *world_size* ranks; raise one TopologyError that lists every problem."""
        views = tuple(views)
        problems = sizes.problems(world_size)
        nearest = cls.nearest(sizes, world_size)
        # A view built from sizes that do not multiply to the world size has the same wrong size: report that once.
        covered = [view for view in views if not problems or view.size != nearest.world_size]
        problems += coverage_problems(covered, world_size)
        problems += layout_problems((nearest.dense, *views))
        problems += missing_axes(sizes.beyond_dense, nearest.dense, views)
        if problems:
            raise TopologyError(problems)
        return cls(world_size, nearest.dense, views)

    @classmethod
    def nearest(cls, sizes: ParallelismSizes, world_size: int) -> MeshPlan:
        """Return the plan of *sizes* over as many ranks as they multiply to, which may differ from *world_size*.

        Every axis keeps its requested size, so plugins can validate it and report their problems together with the
        others.
        """
        dense = _dense(sizes, world_size)
        return cls(dense.size, dense)

    @property
    def wide(self) -> tuple[Axis, ...]:
        """The axes of size above 1 in all views, dense view first, each name once."""
        return tuple(dict.fromkeys(axis for view in self._all for axis in view.axes if axis.size > 1))

    @property
    def _all(self) -> tuple[View, ...]:
        return (self.dense, *self.views)

    def size(self, axis: str) -> int:
        """Return the size of *axis*, an axis or flattened name of any view; raise ValueError if there is none."""
        return self.view_of(axis).size_of(axis)

    def view_of(self, axis: str) -> View:
        """Return the first view, dense first, with *axis* as an axis or flattened name; raise ValueError if none."""
        for view in self._all:
            if axis in view:
                return view
        raise unknown_axis(axis, self._all)

    def _view(self, name: str) -> View:
        for view in self._all:
            if view.name == name:
                return view
        names = [view.name for view in self._all]
        raise ValueError(f"the mesh has no view {name!r}{near(name, names)} (views: {', '.join(names)})")

    def _check_rank(self, rank: int) -> None:
        integer("rank", rank, 0, self.world_size - 1)

    def coordinates(self, rank: int, view: str = DENSE) -> dict[str, int]:
        """Return the coordinate of *rank* on each axis of *view*, outermost axis first."""
        self._check_rank(rank)
        place = {}
        for axis in reversed(self._view(view).axes):
            rank, place[axis.name] = divmod(rank, axis.size)
        return dict(reversed(place.items()))

    def rank_at(self, coordinates: Mapping[str, int], view: str = DENSE) -> int:
        """Return the rank at *coordinates*; raise ValueError unless they name every axis of *view* and nothing else."""
        found = self._view(view)
        for name in coordinates:
            if name not in found.names:
                raise unknown_axis(name, [attrs.evolve(found, flattened={})])
        if missing := [name for name in found.names if name not in coordinates]:
            raise ValueError(f"coordinates must name every axis of view {view!r} (missing: {', '.join(missing)})")
        rank = 0
        for axis in found.axes:
            rank = rank * axis.size + integer(f"coordinate {axis.name!r}", coordinates[axis.name], 0, axis.size - 1)
        return rank

    def groups(self, axis: str) -> Iterator[tuple[int, ...]]:
        """Yield every group of ranks along *axis*, ordered by smallest rank; ranks ascend within a group.

        The ranks of a group differ only in their coordinate on *axis*, and every rank is in one group. A flattened name
        counts as one axis. The order is that of torch's ``DeviceMesh``.
        """
        size, step = self.view_of(axis).span(axis)
        return (
            tuple(range(first, first + size * step, step))
            for block in range(0, self.world_size, size * step)
            for first in range(block, block + step)
        )

    def group_of(self, rank: int, axis: str) -> tuple[int, ...]:
        """Return the group of *rank* along *axis*: the ranks that differ from it only in that coordinate, ascending."""
        self._check_rank(rank)
        size, step = self.view_of(axis).span(axis)
        first = rank - rank // step % size * step
        return tuple(range(first, first + size * step, step))

    def dp_rank(self, rank: int) -> int:
        """Return the data-parallel coordinate of *rank*: which of the ``size("dp")`` batches it reads."""
        self._check_rank(rank)
        size, step = self.dense.span("dp")
        return rank // step % size

    def splitting(self, role: Role) -> int:
        """Return into how many parts the ranks split what *role* says: the product of the dense axes with that role."""
        return math.prod(self.dense.size_of(axis) for axis in self.dense.splitting(role))

    def batch_ranks(self, rank: int) -> tuple[int, ...]:
        """Return the ranks that read the same batch as *rank*, ascending and including it: same dp coordinate."""
        step = self.dense.span("dp")[1]
        first = self.dp_rank(rank) * step
        stages = self.splitting(Role.LAYERS)  # the outermost axes
        return tuple(
            stage * (self.world_size // stages) + first + inner for stage in range(stages) for inner in range(step)
        )
