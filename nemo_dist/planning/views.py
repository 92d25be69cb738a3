"""A view: one factorisation of all ranks into axes, with integers only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from enum import Flag, auto
from itertools import combinations
from typing import Any

import attrs

from nemo_dist.planning.validation import FrozenMapping, integer, near, shown

DENSE = "dense"  # the name of the view that every plan has


class Role(Flag):
    """What the ranks along an axis split between them; roles are joined by ``|``.

    ``BATCH``: they read different rows of the batch. ``SEQUENCE``: different parts of the same sequences.
    ``PARAMETERS``: they hold different parts of the same matrices, or different experts, and read the same tokens.
    ``LAYERS``: different layers. ``TOKENS`` is ``BATCH | SEQUENCE``: the ranks that see different tokens, over which
    losses are summed and gradients averaged.
    """

    BATCH = auto()
    SEQUENCE = auto()
    PARAMETERS = auto()
    LAYERS = auto()
    TOKENS = BATCH | SEQUENCE


def _check_name(_: object, field: attrs.Attribute[Any], name: object) -> None:
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"the {field.name} of an axis or view must be a Python identifier (got {shown(name)})")


@attrs.frozen
class Axis:
    """One axis of a view: its name, its number of ranks, and what they split between them."""

    name: str = attrs.field(validator=_check_name)
    size: int = attrs.field()
    # Not compared: views may share an axis, and then the role is the one that the first view, the dense one, gives it.
    role: Role = attrs.field(default=Role.PARAMETERS, validator=attrs.validators.instance_of(Role), eq=False)

    @size.validator
    def _check_size(self, _: object, size: int) -> None:
        integer(f"the size of axis {self.name!r}", size)


def _tuple(axes: Iterable[Axis]) -> tuple[Axis, ...]:
    return tuple(axes)


def _frozen_runs(runs: Mapping[str, Iterable[str]]) -> FrozenMapping[tuple[str, ...]]:
    return FrozenMapping({name: tuple(run) for name, run in runs.items()})


@attrs.frozen
class View:
    """One factorisation of all ranks into axes, outermost first, with flattened names for runs of consecutive axes.

    Raises ValueError for an axis name that appears twice, for a flattened name that is also an axis, and for a
    flattened name whose axes are not consecutive and in order.
    """

    name: str = attrs.field(validator=_check_name)
    axes: tuple[Axis, ...] = attrs.field(converter=_tuple)
    flattened: Mapping[str, tuple[str, ...]] = attrs.field(factory=FrozenMapping, converter=_frozen_runs)

    @axes.validator
    def _check_axes(self, _: object, axes: tuple[Axis, ...]) -> None:
        names = [axis.name for axis in axes]
        if not axes or len(set(names)) < len(names):
            raise ValueError(f"view {self.name!r} must have axes, each name once (got {names})")

    @flattened.validator
    def _check_flattened(self, _: object, flattened: Mapping[str, tuple[str, ...]]) -> None:
        for name, run in flattened.items():
            if name in self.names:
                raise ValueError(f"view {self.name!r}: {name!r} is an axis; give the flattened axes another name")
            start = self.names.index(run[0]) if run and run[0] in self.names else 0
            if not run or self.names[start : start + len(run)] != run:
                raise ValueError(
                    f"view {self.name!r}: {name!r} must flatten consecutive axes in order (got {run} of {self.names})"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the axes, outermost first."""
        return tuple(axis.name for axis in self.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the axes, outermost first."""
        return tuple(axis.size for axis in self.axes)

    @property
    def size(self) -> int:
        """The number of ranks that the view covers: the product of its axes."""
        return math.prod(self.shape)

    def splitting(self, role: Role) -> tuple[str, ...]:
        """Return the names of the axes with *role*, outermost first."""
        return tuple(axis.name for axis in self.axes if axis.role in role)

    def __contains__(self, axis: object) -> bool:
        return axis in self.names or axis in self.flattened

    def size_of(self, axis: str) -> int:
        """Return the size of *axis*, which may be a flattened name; raise ValueError when the view has no such axis."""
        return self.span(axis)[0]

    def span(self, axis: str) -> tuple[int, int]:
        """Return the size of *axis*, and by how much the rank changes from one of its coordinates to the next."""
        if axis not in self:
            raise unknown_axis(axis, [self])
        run = self.flattened.get(axis, (axis,))
        start = self.names.index(run[0])
        stop = start + len(run)
        return math.prod(self.shape[start:stop]), math.prod(self.shape[stop:])


def unknown_axis(axis: object, views: Sequence[View]) -> ValueError:
    """Return the ValueError for an *axis* that none of *views* has, with the nearest match and the valid names."""
    names = [*dict.fromkeys(name for view in views for name in (*view.names, *view.flattened))]
    where = f"view {views[0].name!r}" if len(views) == 1 else "the mesh"
    return ValueError(f"{where} has no axis {axis!r}{near(axis, names)} (axes: {', '.join(names)})")


def _clash(one: View, other: View) -> str:
    """Return the error for names that *one* and *other* share but may not, or an empty string.

    Views may share only their leading axes, with equal sizes.
    """
    lead = 0
    for mine, theirs in zip(one.axes, other.axes, strict=False):
        if mine != theirs:
            break
        lead += 1
    shared = set(one.names[:lead])
    wrong = [name for name in (*other.names, *other.flattened) if name in one and name not in shared]
    if not wrong:
        return ""
    return (
        f"view {other.name!r} {_layout(other)} and view {one.name!r} {_layout(one)} both have {', '.join(wrong)}; "
        "views may share only their leading axes, with the same sizes: rename the others"
    )


def _layout(view: View) -> str:
    return "(" + ", ".join(f"{axis.name} {axis.size}" for axis in view.axes) + ")"


def layout_problems(views: Sequence[View]) -> list[str]:
    """Return one sentence for each name conflict between *views*, of which the dense one comes first."""
    names = [view.name for view in views]
    twice = dict.fromkeys(name for name in names if names.count(name) > 1)
    problems = [f"{names.count(name)} views are called {name!r}; give each its own name" for name in twice]
    return problems + [clash for one, other in combinations(views, 2) if (clash := _clash(one, other))]


def coverage_problems(views: Sequence[View], world_size: int) -> list[str]:
    """Return one sentence for each of *views* that does not have exactly *world_size* ranks."""
    return [
        f"view {view.name!r} {_layout(view)} has {view.size} ranks, but the world has {world_size}; "
        "the axes of a view must multiply to the world"
        for view in views
        if view.size != world_size
    ]


def missing_axes(wanted: Mapping[str, int], dense: View, views: Sequence[View]) -> list[str]:
    """Return one sentence for each of the *wanted* axes that no additional view has with the wanted size."""
    problems = []
    for axis, size in wanted.items():
        found = next((view for view in views if axis in view.names), None)
        if axis in dense:
            problems.append(
                f"extra axis {axis!r} is an axis of the dense mesh, whose sizes have their own fields; rename it"
            )
        elif found is None:
            problems.append(
                f"axis {axis!r} has size {size}, but no view has it; select a plugin that adds it, or drop it"
            )
        elif found.size_of(axis) != size:
            problems.append(
                f"axis {axis!r} has size {size}, but view {found.name!r} {_layout(found)} gives it "
                f"{found.size_of(axis)}; the plugin that adds the view must take the size that was asked for"
            )
    return problems
