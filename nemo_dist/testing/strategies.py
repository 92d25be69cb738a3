"""Hypothesis strategies for everything the planner knows: worlds, sizes, views and plans.

For a property of your plugin, draw plans in which only the axes that you compose with are wide::

    from hypothesis import given
    from nemo_dist.testing import strategies

    @given(plan=strategies.plans(axes=("dp_shard", "tp"), max_views=0))
    def test_every_rank_gets_a_slice(plan): ...

Every strategy shrinks towards one rank and no views.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

import attrs
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from nemo_dist.planning.mesh_plan import Axis, MeshPlan, Role, View
from nemo_dist.planning.sizes import ParallelismSizes
from nemo_dist.testing.call_names import ANY_TIME, CALLS, WITH_OPTIMIZER, possible

__all__ = [
    "AXES",
    "call_orders",
    "factorisations",
    "own_axes",
    "parallelism_sizes",
    "plans",
    "topologies",
    "views",
    "worlds",
]

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


@st.composite
def worlds(draw: DrawFn, max_world: int = 512) -> int:
    """Draw a number of ranks from 1 to *max_world*, mostly one with many small factors, as real world sizes have."""
    if draw(st.integers(0, 4)) == 4:
        return draw(st.integers(1, max_world))
    world = 1
    for factor in draw(st.lists(st.sampled_from((2, 3, 5)), max_size=max_world.bit_length())):
        if world * factor <= max_world:
            world *= factor
    return world


@st.composite
def factorisations(draw: DrawFn, whole: int, parts: int) -> tuple[int, ...]:
    """Draw *parts* sizes, at least 1 each, whose product is *whole*: each prime factor is assigned to one of them."""
    sizes = [1] * parts
    for factor in _prime_factors(whole):
        sizes[draw(st.integers(0, parts - 1))] *= factor
    return tuple(sizes)


def _prime_factors(whole: int) -> Iterator[int]:
    factor = 2
    while factor * factor <= whole:
        if whole % factor:
            factor += 1
        else:
            yield factor
            whole //= factor
    if whole > 1:
        yield whole


@st.composite
def topologies(draw: DrawFn, max_world: int = 512, axes: Collection[str] = AXES) -> tuple[ParallelismSizes, int]:
    """Draw sizes and the number of ranks that they multiply to, up to *max_world*; only *axes* may be above 1.

    *axes* are names of dense axes. ``dp_size`` and ``dp_replicate_size`` are sometimes None where that means the same.
    """
    wide = [axis for axis in AXES if axis in axes]
    if not wide or len(wide) < len(set(axes)):
        raise ValueError(f"axes must name some of {', '.join(AXES)} (got {axes!r})")
    world = draw(worlds(max_world))
    sizes = dict.fromkeys(AXES, 1) | dict(zip(wide, draw(factorisations(world, len(wide))), strict=True))
    if sizes["dp_replicate"] == world:  # replicas and nothing else are refused
        sizes["dp_shard"], sizes["dp_replicate"] = world if "dp_shard" in axes else 1, 1
    dp = sizes["dp_replicate"] * sizes["dp_shard"]
    replicate = sizes["dp_replicate"]
    return (
        ParallelismSizes(
            tp_size=sizes["tp"],
            pp_size=sizes["pp"],
            cp_size=sizes["cp"],
            dp_size=draw(st.sampled_from((None, dp))),
            dp_replicate_size=draw(st.sampled_from((None, 1))) if replicate == 1 else replicate,
        ),
        math.prod(sizes.values()),
    )


def parallelism_sizes(max_world: int = 512, axes: Collection[str] = AXES) -> SearchStrategy[ParallelismSizes]:
    """Draw sizes that fit some number of ranks up to *max_world*; to know that number too, draw ``topologies``."""
    return topologies(max_world, axes).map(lambda topology: topology[0])


@st.composite
def own_axes(draw: DrawFn, sizes: ParallelismSizes, max_axes: int = 2, max_size: int = 3) -> ParallelismSizes:
    """Draw *sizes* with up to *max_axes* axes of third parties, each of up to *max_size* ranks and with a role."""
    single = (Role.LAYERS, Role.BATCH, Role.SEQUENCE, Role.PARAMETERS)
    names = [f"own_{number}" for number in range(draw(st.integers(0, max_axes)))]
    extra = {name: draw(st.integers(1, max_size)) for name in names}
    return attrs.evolve(sizes, extra=extra).with_roles({name: draw(st.sampled_from(single)) for name in names})


@st.composite
def views(draw: DrawFn, dense: View, name: str = "view") -> View:
    """Draw a view called *name* of the ranks of *dense*; it may share leading axes and may have flattened names."""
    shared = dense.axes[: draw(st.integers(0, len(dense.axes)))]
    rest = dense.size // math.prod(axis.size for axis in shared)
    fresh = draw(factorisations(rest, draw(st.integers(1, 3))))
    axes = (*shared, *(Axis(f"{name}_{place}", size) for place, size in enumerate(fresh)))
    names = [axis.name for axis in axes]
    flattened = {}
    for run in range(draw(st.integers(0, 2))):
        start = draw(st.integers(0, len(names) - 1))
        flattened[f"{name}_run_{run}"] = names[start : draw(st.integers(start, len(names) - 1)) + 1]
    return View(name, axes, flattened)


@st.composite
def plans(
    draw: DrawFn, max_world: int = 512, axes: Collection[str] = AXES, max_views: int = 2, max_own: int = 0
) -> MeshPlan:
    """Draw a plan with up to *max_views* views besides the dense one; of the dense axes only *axes* may be above 1.

    With *max_own* it has up to as many axes of third parties besides, which multiply the ranks.
    """
    sizes, world = draw(topologies(max_world, axes))
    if max_own:
        sizes = draw(own_axes(sizes, max_own))
        world *= math.prod(sizes.extra.values())
    dense = MeshPlan.resolve(sizes, world).dense
    extra = [draw(views(dense, f"view_{number}")) for number in range(draw(st.integers(0, max_views)))]
    declared = {axis.name: axis.size for view in extra for axis in view.axes if axis.name not in dense}
    return MeshPlan.resolve(attrs.evolve(sizes, extra={**sizes.extra, **declared}), world, extra)


@st.composite
def call_orders(draw: DrawFn, without: Collection[str] = (), most: int = 10) -> list[str]:
    """Draw an order of calls for ``nemo_dist.testing.call_orders``, at most *most* of them with an optimizer.

    *without*: calls that are not drawn, as those that a strategy refuses.
    """
    calls = [call for call in CALLS if call not in without]
    some = st.lists(st.sampled_from([call for call in calls if call in ANY_TIME]), max_size=2)
    early = st.sampled_from([call for call in calls if call not in WITH_OPTIMIZER])
    # Training calls twice as often as all others: an order without a step shows little.
    step = st.sampled_from(("forward_backward", "accumulate", "clip", "update", "update", "zero_grad"))
    late = st.lists(st.one_of(step, st.sampled_from(calls)), min_size=2, max_size=most)
    return possible([*draw(some), "runtime", *draw(st.lists(early, max_size=3)), "optimizer", *draw(late)])
