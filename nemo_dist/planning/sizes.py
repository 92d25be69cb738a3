"""The requested size of each mesh axis, before a plan exists."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import attrs

from nemo_dist.planning.validation import FrozenMapping, integer, number_of_ranks, shown
from nemo_dist.planning.views import Role

# An axis that has its own field, or that the planner derives, cannot be declared again in ``extra``.
_FIELD_OF = {axis: f"{axis}_size" for axis in ("tp", "pp", "cp", "ep", "dp", "dp_replicate")}


def _check_size(_: object, field: attrs.Attribute[Any], value: object) -> None:
    number_of_ranks(field.name, value)


def _check_optional_size(_: object, field: attrs.Attribute[Any], value: object) -> None:
    if value is not None:
        number_of_ranks(field.name, value)


def _frozen_extra(extra: object) -> FrozenMapping[int]:
    if not isinstance(extra, Mapping):
        raise TypeError(
            f"extra must be a mapping from axis names to sizes (got {shown(extra)} of type {type(extra).__name__}); "
            "pass extra={'axis': 2}"
        )
    return FrozenMapping(extra)


def _frozen_roles(roles: object) -> FrozenMapping[Role]:
    if not isinstance(roles, Mapping) or not all(isinstance(role, Role) for role in roles.values()):
        raise TypeError(f"roles must be a mapping from axis names to Role (got {shown(roles)}); plugins declare it")
    return FrozenMapping(roles)


def _check_extra(_: object, __: object, extra: Mapping[str, int]) -> None:
    for axis, size in extra.items():
        if not isinstance(axis, str):
            raise TypeError(f"extra must be keyed by axis names (got {shown(axis)} of type {type(axis).__name__})")
        if not axis.isidentifier():
            raise ValueError(f"extra must be keyed by axis names that are Python identifiers (got {shown(axis)})")
        if field := _FIELD_OF.get(axis.removesuffix("_size")):
            raise ValueError(
                f"extra[{axis!r}] repeats a size that has its own field; pass {field}={shown(size)} instead"
            )
        number_of_ranks(f"extra[{shown(axis)}]", size)


def _product(sizes: Mapping[str, int]) -> str:
    """Format the factors and their product: ``pp_size * tp_size = 2 * 4 = 8``."""
    return f"{' * '.join(sizes)} = {' * '.join(map(str, sizes.values()))} = {math.prod(sizes.values())}"


def _nearest_divisors(size: int, whole: int) -> str:
    """Format ``use 2 or 4, or ``: the nearest divisors of *whole* below and above *size*, other than 1 and *whole*.

    Returns an empty string when there are none.
    """
    small = [n for n in range(2, math.isqrt(whole) + 1) if whole % n == 0]
    divisors = [*small, *(whole // n for n in reversed(small))]
    below = max((n for n in divisors if n < size), default=None)
    above = min((n for n in divisors if n > size), default=None)
    found = " or ".join(str(n) for n in (below, above) if n)
    return f"use {found}, or " if found else ""


@attrs.frozen(kw_only=True)
class ParallelismSizes:
    """The requested number of ranks per axis; an axis that is left out has size 1.

    ``dp_size=None`` is inferred: ``world_size / (pp_size * cp_size * tp_size)``, where the axes of ``extra`` that have
    a role divide too. ``dp_replicate_size=None`` is 1. ``extra`` holds the axes of other plugins. An axis of ``extra``
    with a role is placed in the dense mesh, next to our axes of that role; ``roles`` maps it to its role, and ``build``
    fills that in from the plugins. For ``ep_size`` above 1 and the other axes of ``extra`` a selected plugin must add a
    view, another factorisation of the same ranks.

    Raises TypeError for a size that is not an int, ValueError for one below 1; each names its field.
    """

    tp_size: int = attrs.field(default=1, validator=_check_size)
    pp_size: int = attrs.field(default=1, validator=_check_size)
    cp_size: int = attrs.field(default=1, validator=_check_size)
    ep_size: int = attrs.field(default=1, validator=_check_size)
    dp_size: int | None = attrs.field(default=None, validator=_check_optional_size)
    dp_replicate_size: int | None = attrs.field(default=None, validator=_check_optional_size)
    extra: Mapping[str, int] = attrs.field(factory=FrozenMapping, converter=_frozen_extra, validator=_check_extra)
    roles: Mapping[str, Role] = attrs.field(factory=FrozenMapping, converter=_frozen_roles)

    def with_roles(self, roles: Mapping[str, Role]) -> ParallelismSizes:
        """Return a copy with the role of every axis of ``extra`` that is a key of *roles*."""
        return attrs.evolve(self, roles={axis: role for axis, role in roles.items() if axis in self.extra})

    def own_axes(self, role: Role) -> dict[str, int]:
        """Return the axes of ``extra`` with *role*, and their sizes."""
        return {axis: size for axis, size in self.extra.items() if self.roles.get(axis, Role(0)) & role}

    @property
    def beside_dp(self) -> Mapping[str, int]:
        """The sizes that multiply with ``dp_size`` to the world size, under the names that the user passes."""
        sizes = {"pp_size": self.pp_size, "cp_size": self.cp_size, "tp_size": self.tp_size}
        return sizes | {axis: size for axis, size in self.extra.items() if axis in self.roles}

    @property
    def model_size(self) -> int:
        """The number of ranks per batch: ``pp_size * cp_size * tp_size``, times the axes of ``extra`` with a role."""
        return math.prod(self.beside_dp.values())

    @property
    def beyond_dense(self) -> Mapping[str, int]:
        """The axes that a plugin must add as a view: ``ep`` when above 1, and the axes of ``extra`` without a role."""
        own = {axis: size for axis, size in self.extra.items() if axis not in self.roles}
        return FrozenMapping({"ep": self.ep_size, **own} if self.ep_size > 1 else own)

    def dp(self, world_size: int) -> int:
        """Return ``dp_size`` or, when it is None, what *world_size* leaves for it, rounded down, at least 1."""
        integer("world_size", world_size)
        return self.dp_size or max(1, world_size // self.model_size)

    def problems(self, world_size: int) -> list[str]:
        """Return every reason why the sizes do not make *world_size* ranks: one sentence each, with a way to fix it."""
        integer("world_size", world_size)
        problems = [*self._world_problems(world_size), *self._dp_problems(world_size)]
        # dp_replicate divides dp, so it can only be checked when dp is known.
        if self.dp_size is not None or not problems:
            problems += self._replicate_problems(self.dp(world_size))
        return problems

    def _world_problems(self, world_size: int) -> list[str]:
        model = self.model_size
        if world_size % model == 0:
            return []
        below = world_size // model * model
        worlds = f"{below} or {below + model}" if below else str(model)
        worlds = worlds if self.dp_size is None else str(self.dp_size * model)
        reason = (
            f"world_size {world_size} is not divisible by {_product(self.beside_dp)}; "
            f"start {worlds} ranks, or choose sizes whose product divides {world_size}"
        )
        return [reason]

    def _dp_problems(self, world_size: int) -> list[str]:
        if self.dp_size is None or self.dp_size * self.model_size == world_size:
            return []
        factors = {"dp_size": self.dp_size, **self.beside_dp}
        inferred, rest = divmod(world_size, self.model_size)
        leave = f"leave dp_size out to get {inferred}, or " if not rest else ""
        return [
            f"{_product(factors)}, but world_size is {world_size}; {leave}start {self.dp_size * self.model_size} ranks"
        ]

    def _replicate_problems(self, dp: int) -> list[str]:
        replicate = self.dp_replicate_size or 1
        origin = "" if self.dp_size is not None else f", which is world_size / ({' * '.join(self.beside_dp)})"
        if dp % replicate:
            return [
                f"dp_replicate_size {replicate} does not divide the data-parallel size {dp}{origin}; "
                f"{_nearest_divisors(replicate, dp)}leave it out"
            ]
        if replicate == dp > 1 and self.model_size == 1:
            return [
                f"dp_replicate_size {replicate} equals the data-parallel size{origin}: that leaves dp_shard 1, "
                "which is pure replicas; lower it, leave it out, or use a strategy that only replicates"
            ]
        return []
