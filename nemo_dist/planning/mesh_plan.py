"""Enumerate the axes of the mesh: whole numbers only, no torch and no process group.

======================  ==============================  =============================================
axis, outermost first   size                            ranks that differ only in it
======================  ==============================  =============================================
``pp``                  ``pp_size``                     hold different layers
``dp_replicate``        ``dp_replicate_size``           hold equal shards, read different batches
``dp_shard``            ``dp_size/dp_replicate_size``   hold different shards, read different batches
``cp``                  ``cp_size``                     read different parts of the same sequences
``tp``                  ``tp_size``                     hold different parts of the same matrices
======================  ==============================  =============================================

Ranks run from 0 to ``world_size - 1`` in row-major order: the last axis of a view changes fastest, as in torch's
``init_device_mesh``. A plugin may add views: other factorisations of the same ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import attrs

from nemo_dist.errors import TopologyError
from nemo_dist.planning.sizes import ParallelismSizes
from nemo_dist.planning.validation import integer, near
from nemo_dist.planning.views import DENSE, Axis, View, coverage_problems, layout_problems, missing_axes, unknown_axis

__all__ = ["DENSE", "Axis", "MeshPlan", "View"]

_FLATTENED = {
    "dp": ("dp_replicate", "dp_shard"),
    "dp_shard_cp": ("dp_shard", "cp"),
    "dp_cp": ("dp_replicate", "dp_shard", "cp"),
}


def _dense(pp: int, replicate: int, shard: int, cp: int, tp: int) -> View:
    names = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
    sizes = (pp, replicate, shard, cp, tp)
    return View(DENSE, [Axis(name, size) for name, size in zip(names, sizes, strict=True)], _FLATTENED)


def _tuple(views: Iterable[View]) -> tuple[View, ...]:
    return tuple(views)


@attrs.frozen
class MeshPlan:
    """The resolved mesh: which ranks exist and how each view arranges them; frozen, hashable and picklable.

    Make one with :meth:`resolve`. Every query is arithmetic on one rank, so it costs the same at 100,000 ranks.
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
        """Return the plan of *sizes* over *world_size* ranks; raise one TopologyError with every problem."""
        views = tuple(views)
        problems = sizes.problems(world_size)
        nearest = cls.nearest(sizes, world_size)
        # A view made from sizes that do not multiply out misses the world by the same sizes: say that once.
        covered = [view for view in views if not problems or view.size != nearest.world_size]
        problems += coverage_problems(covered, world_size)
        problems += layout_problems((nearest.dense, *views))
        problems += missing_axes(sizes.beyond_dense, nearest.dense, views)
        if problems:
            raise TopologyError(problems)
        return cls(world_size, nearest.dense, views)

    @classmethod
    def nearest(cls, sizes: ParallelismSizes, world_size: int) -> MeshPlan:
        """Return the plan of *sizes*, over fewer or more ranks where they do not multiply to *world_size*.

        Every axis keeps the size that was asked for, so that a plugin finds in it all that is wrong for itself.
        """
        replicate = sizes.dp_replicate_size or 1
        shard = max(1, sizes.dp(world_size) // replicate)
        dense = _dense(sizes.pp_size, replicate, shard, sizes.cp_size, sizes.tp_size)
        return cls(dense.size, dense)

    @property
    def wide(self) -> tuple[Axis, ...]:
        """The axes with more than one rank, over all views, dense first, each name once."""
        return tuple(dict.fromkeys(axis for view in self._all for axis in view.axes if axis.size > 1))

    @property
    def _all(self) -> tuple[View, ...]:
        return (self.dense, *self.views)

    def size(self, axis: str) -> int:
        """Return the ranks along *axis*, an axis or flattened name of any view; raise ValueError for an unknown one."""
        return self.view_of(axis).size_of(axis)

    def view_of(self, axis: str) -> View:
        """Return the view that has *axis* as an axis or flattened name, the dense one first."""
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
        """Return where *rank* stands on each axis of *view*, outermost first."""
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
        """Yield the groups of ranks along *axis*, each in the order of its coordinates, by smallest rank.

        Each group holds the ranks that differ only in *axis*; together they are every rank once. A flattened name
        counts as one axis. The order is that of torch's ``DeviceMesh``.
        """
        size, step = self.view_of(axis).span(axis)
        return (
            tuple(range(first, first + size * step, step))
            for block in range(0, self.world_size, size * step)
            for first in range(block, block + step)
        )

    def group_of(self, rank: int, axis: str) -> tuple[int, ...]:
        """Return *rank* and the ranks that differ from it only in *axis*, in the order of their coordinates."""
        self._check_rank(rank)
        size, step = self.view_of(axis).span(axis)
        first = rank - rank // step % size * step
        return tuple(range(first, first + size * step, step))

    def dp_rank(self, rank: int) -> int:
        """Return which of the ``size("dp")`` batches *rank* reads."""
        self._check_rank(rank)
        size, step = self.dense.span("dp")
        return rank // step % size

    def batch_ranks(self, rank: int) -> tuple[int, ...]:
        """Return the ranks that read the same batch as *rank*, itself included, in order: the same dp coordinate."""
        step = self.dense.span("dp")[1]
        first = self.dp_rank(rank) * step
        return tuple(stage + inner for stage in self.group_of(first, "pp") for inner in range(step))
