"""Name the axis along which the results of ranks went wrong, from what the ranks hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import attrs
import torch
from torch import Tensor

from nemo_dist.planning.mesh_plan import MeshPlan
from nemo_dist.testing.layouts import relative


@attrs.frozen(kw_only=True, eq=False)
class Held:
    """What a rank holds of one tensor, and what it should hold: None where that is only known to be a part."""

    rank: int
    value: Tensor
    expected: Tensor | None
    right: bool


@attrs.frozen
class Blame:
    """The axis that a difference is put down to, None where the ranks' values do not tell; ``why`` in words."""

    axis: str | None
    why: str


def blame(held: Sequence[Held], plan: MeshPlan, bound: float) -> Blame:
    """Return the axis along which *held* goes wrong.

    In this order: a sum or mean that was left out, copies that differ, a factor, ranks of one coordinate only, the only
    axis that there is.
    """
    wide = [axis.name for axis in plan.wide]
    for find in (_not_summed, _copies_differ, _only_some):
        for axis in wide:
            if why := find(held, plan, axis, bound):
                return Blame(_same_ranks(plan, axis), why)
    if factor := _factor(held, bound):
        fitting = [axis for axis in wide if _is_power_of(factor, plan.size(axis))]
        if fitting or held[0].value.dim():  # of a single number every other one is a multiple
            text = f"every rank has {factor:.4g} times what it should have"
            return Blame(_one_of(plan, fitting or wide), text)
    return Blame(_one_of(plan, wide), "on every rank")


def _same_ranks(plan: MeshPlan, axis: str) -> str:
    """Return *axis*, with the names of other axes that have the same groups of ranks."""
    groups = set(plan.groups(axis))
    others = [other.name for other in plan.wide if other.name != axis and set(plan.groups(other.name)) == groups]
    return " = ".join([axis, *others])


def _one_of(plan: MeshPlan, axes: Sequence[str]) -> str | None:
    """Return the only one of *axes*, which may have several names; None where there are several."""
    names = {frozenset(_same_ranks(plan, axis).split(" = ")): axis for axis in reversed(axes)}
    return _same_ranks(plan, next(iter(names.values()))) if len(names) == 1 else None


def coordinates(plan: MeshPlan, rank: int) -> dict[str, int]:
    """Return the coordinates of *rank* along every axis of every view."""
    views = (plan.dense, *plan.views)
    return {axis: place for view in views for axis, place in plan.coordinates(rank, view.name).items()}


def _groups(held: Sequence[Held], plan: MeshPlan, axis: str) -> Iterator[list[Held]]:
    """Yield what the ranks of each group along *axis* hold."""
    for ranks in plan.groups(axis):
        found = [one for one in held if one.rank in ranks]
        if len(found) > 1:
            yield found


def _alike(group: Sequence[Held]) -> bool:
    """Whether the ranks of *group* should hold the same."""
    first = group[0].expected
    return first is not None and all(
        one.expected is not None and one.expected.shape == first.shape and torch.equal(one.expected, first)
        for one in group
    )


def _not_summed(held: Sequence[Held], plan: MeshPlan, axis: str, bound: float) -> str | None:
    groups = [group for group in _groups(held, plan, axis) if _alike(group)]
    if not groups or all(one.right for group in groups for one in group):
        return None
    for word, divisor in (("sum", 1), ("mean", plan.size(axis))):
        joined = [(torch.stack([one.value.double() for one in group]).sum(0) / divisor, group[0]) for group in groups]
        differing = any(relative(one.value, group[0].value) > bound for group in groups for one in group)
        if differing and all(
            one.expected is not None and relative(value, one.expected) <= bound for value, one in joined
        ):
            return f"the {word} over the ranks of {axis} is right, so it was left out"
    return None


def _copies_differ(held: Sequence[Held], plan: MeshPlan, axis: str, bound: float) -> str | None:
    for group in _groups(held, plan, axis):
        if _alike(group) and any(relative(one.value, group[0].value) > bound for one in group[1:]):
            return f"ranks {', '.join(str(one.rank) for one in group)} of {axis} should hold the same, and do not"
    return None


def _only_some(held: Sequence[Held], plan: MeshPlan, axis: str, bound: float) -> str | None:
    by_place: dict[int, set[bool]] = {}
    for one in held:
        by_place.setdefault(coordinates(plan, one.rank)[axis], set()).add(one.right)
    wrong = sorted(place for place, rights in by_place.items() if False in rights)
    clean = all(len(rights) == 1 for rights in by_place.values())
    if clean and 0 < len(wrong) < len(by_place):
        return f"only on the ranks with {axis} = {', '.join(map(str, wrong))}"
    return None


def _factor(held: Sequence[Held], bound: float) -> float | None:
    """Return the one factor by which every value is too large, if there is one."""
    factors = []
    for one in held:
        if one.expected is None or one.expected.shape != one.value.shape:
            return None
        found, expected = one.value.double().flatten(), one.expected.double().flatten()
        factor = (found @ expected / (expected @ expected).clamp(min=1e-30)).item()
        if not factor or relative(found, factor * expected) > bound:
            return None
        factors.append(factor)
    return factors[0] if factors and max(factors) - min(factors) <= 1e-4 * abs(factors[0]) else None


def _is_power_of(factor: float, size: int) -> bool:
    return any(abs(factor - power) <= 1e-3 * power for power in (size, 1 / size, size**2, 1 / size**2))
