"""Hypothesis strategies: worlds, sizes, views, plans, selections of plugins, batches, and orders of calls; no torch.

For a property of your plugin, draw plans in which only the axes that you compose with are wide, and those of your own::

    from hypothesis import given
    from nemo_dist.testing import strategies

    @given(plan=strategies.plans(axes=("dp_shard", "rows"), plugins=("rows",), max_views=0))
    def test_every_rank_gets_a_slice(plan): ...

A parameter called ``plugins`` takes installed names, classes or instances; their ``axes``, ``roles`` and ``views`` say
which axes there are besides ours, and what their ranks split. Every strategy shrinks towards one rank, one row and no
views.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import attrs
from hypothesis import reject
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from nemo_dist.errors import PluginError, TopologyError
from nemo_dist.hf_model import IGNORED
from nemo_dist.planning.mesh_plan import Axis, MeshPlan, Role, View
from nemo_dist.planning.sizes import ParallelismSizes
from nemo_dist.planning.validation import near, shown
from nemo_dist.plugin.hook_caller import PluginCalls
from nemo_dist.plugin.protocol import Stage, declared
from nemo_dist.plugin.registry import Registry
from nemo_dist.setup.composition import in_order
from nemo_dist.setup.setup import DistributedSetup
from nemo_dist.testing.call_names import ANY_TIME, CALLS, WITH_OPTIMIZER, possible
from nemo_dist.testing.precision import in_float32

__all__ = [
    "AXES",
    "batches",
    "call_orders",
    "factorisations",
    "own_axes",
    "parallelism_sizes",
    "plans",
    "selections",
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
def topologies(
    draw: DrawFn, max_world: int = 512, axes: Collection[str] | None = None, plugins: Iterable[Any] = ()
) -> tuple[ParallelismSizes, int]:
    """Draw sizes and the number of ranks that they multiply to, up to *max_world*; only *axes* may be above 1.

    *axes* are dense axes and axes that *plugins* claim; None is the dense ones, ``ep`` where it is claimed, and axes of
    plugins with a role, which multiply the ranks. Others, which a view adds, divide the ranks of a pipeline stage.
    ``dp_size`` and ``dp_replicate_size`` are sometimes None where that means the same.
    """
    roles = _axes_of(plugins)
    allowed = _allowed(axes, roles)
    multiplying = [axis for axis in allowed if axis in AXES or roles[axis] is not None]
    world = draw(worlds(max_world))
    drawn = dict(zip(multiplying, draw(factorisations(world, len(multiplying))), strict=True)) if multiplying else {}
    sizes = dict.fromkeys(AXES, 1) | drawn
    if sizes["dp_replicate"] == world:  # replicas and nothing else are refused
        sizes["dp_shard"], sizes["dp_replicate"] = world if "dp_shard" in allowed else 1, 1
    world = math.prod(sizes.values())
    within = world // sizes["pp"]
    divisors = [size for size in range(1, within + 1) if within % size == 0]
    sizes |= {axis: draw(st.sampled_from(divisors)) for axis in allowed if axis not in multiplying}
    dp, replicate = sizes["dp_replicate"] * sizes["dp_shard"], sizes["dp_replicate"]
    extra = {axis: sizes[axis] for axis in allowed if axis not in (*AXES, "ep")}
    found = ParallelismSizes(
        tp_size=sizes["tp"],
        pp_size=sizes["pp"],
        cp_size=sizes["cp"],
        ep_size=sizes.get("ep", 1),
        dp_size=draw(st.sampled_from((None, dp))),
        dp_replicate_size=draw(st.sampled_from((None, 1))) if replicate == 1 else replicate,
        extra=extra,
    )
    return found.with_roles({axis: role for axis, role in roles.items() if role is not None}), world


def _axes_of(plugins: Iterable[Any]) -> dict[str, Role | None]:
    """Return the axes that *plugins* claim besides the dense ones, each with its role, or None."""
    chosen = [_plugin(one) for one in plugins]
    return {axis: declared(plugin, "roles").get(axis) for plugin in chosen for axis in sorted(plugin.axes - set(AXES))}


def _plugin(choice: Any) -> Any:
    """Return the plugin instance of a name, a class or an instance."""
    found: Any = Registry().load(choice) if isinstance(choice, str) else choice
    is_class = isinstance(found, type)
    return found(found.config_type()) if is_class else found


def _allowed(axes: Collection[str] | None, own: Mapping[str, Any]) -> list[str]:
    """Return *axes* in a fixed order; raise ValueError for one that is neither dense nor of *own*.

    None leaves out what a plugin may only derive from another size: the axes of views, but ``ep``.
    """
    known = [*AXES, *own]
    if axes is None:
        return [axis for axis in known if axis in (*AXES, "ep") or own[axis] is not None]
    if isinstance(axes, str):
        raise ValueError(f"axes must be several names (got {shown(axes)}); write ({shown(axes)},)")
    for axis in axes:
        if axis not in known:
            raise ValueError(
                f"no axis {shown(axis)} is known here{near(axis, known)} (axes: {', '.join(known)}); name the "
                "plugin that claims it in plugins=(...)"
            )
    return [axis for axis in known if axis in axes]


def parallelism_sizes(
    max_world: int = 512, axes: Collection[str] | None = None, plugins: Iterable[Any] = ()
) -> SearchStrategy[ParallelismSizes]:
    """Draw sizes that fit some number of ranks up to *max_world*; to know that number too, draw ``topologies``."""
    return topologies(max_world, axes, tuple(plugins)).map(lambda topology: topology[0])


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
    draw: DrawFn,
    max_world: int = 512,
    axes: Collection[str] | None = None,
    max_views: int = 2,
    max_own: int = 0,
    plugins: Iterable[Any] = (),
) -> MeshPlan:
    """Draw a plan in which only *axes* may be above 1, dense ones and those of *plugins*, as in ``topologies``.

    It has the views that *plugins* add, and up to *max_views* random ones; with *max_own*, up to as many axes of nobody
    besides, which multiply the ranks. Sizes for which a plugin adds no view are left out.
    """
    chosen = in_order(map(_plugin, plugins))
    sizes, world = draw(topologies(max_world, axes, chosen))
    if max_own:
        more = draw(own_axes(attrs.evolve(sizes, extra={}, roles={}), max_own))
        sizes = attrs.evolve(sizes, extra={**sizes.extra, **more.extra}, roles={**sizes.roles, **more.roles})
        world *= math.prod(more.extra.values())
    added = [view for found in PluginCalls(chosen).views(sizes=sizes, world_size=world) for view in found]
    try:
        dense = MeshPlan.resolve(sizes, world, added).dense
    except TopologyError:
        reject()
    random = [draw(views(dense, f"view_{number}")) for number in range(draw(st.integers(0, max_views)))]
    new = {axis.name: axis.size for view in random for axis in view.axes if axis.name not in dense}
    return MeshPlan.resolve(attrs.evolve(sizes, extra={**sizes.extra, **new}), world, [*added, *random])


@st.composite
def selections(
    draw: DrawFn,
    max_world: int = 8,
    strategies: Collection[str] | None = None,
    plugins: Iterable[Any] = (),
    axes: Collection[str] | None = None,
) -> dict[str, Any]:
    """Draw keywords of ``DistributedSetup.build`` that it accepts, ``world_size`` among them, all in float32.

    ``strategy`` is one of *strategies*, all installed ones by default; *plugins* are selected besides it, and *axes* as
    in ``topologies``, where a dense axis also needs a strategy that composes with it.
    """
    chosen = in_order(map(_plugin, plugins))
    registry = Registry()
    names = sorted(strategies) if strategies is not None else _installed_strategies(registry)
    name = draw(st.sampled_from(names))
    strategy = registry.load(name)
    composed = strategy.axes | strategy.composes_with
    composed |= {axis for plugin in chosen if name in plugin.composes_with for axis in plugin.axes}
    wide = [axis for axis in _allowed(axes, _axes_of(chosen)) if axis in composed]
    sizes, world = draw(topologies(max_world, wide, chosen))
    keywords: dict[str, Any] = {
        "strategy": in_float32(name),
        "parallelism_sizes": attrs.evolve(sizes, roles={}),  # `build` takes roles from the plugins
        "plugins": chosen,
        "world_size": world,
    }
    if "activation_checkpointing" in composed:
        keywords["activation_checkpointing"] = draw(st.booleans())
    try:
        DistributedSetup.build(**keywords)
    except TopologyError:
        reject()
    return keywords


def _installed_strategies(registry: Registry) -> list[str]:
    found = []
    for name in registry:
        try:
            found += [name] if registry.load(name).stage == Stage.DATA else []
        except PluginError:
            continue  # one that does not import cannot be drawn
    return found


@st.composite
def batches(
    draw: DrawFn,
    rows: SearchStrategy[int] | None = None,
    length: SearchStrategy[int] | None = None,
    vocabulary: int = 96,
    padded: bool = True,
    packed: bool = True,
) -> dict[str, list[list[int]]]:
    """Draw a batch for a language model, as lists of numbers; ``of_batch`` in ``testing.tensors`` makes tensors of it.

    *rows* and *length* are by default up to 4 and 12. ``input_ids`` are from 1 up and some ``labels`` -100. With
    *padded* it may have an ``attention_mask``, 0
    at the end of rows, where tokens are 0 and labels -100; with *packed*, ``position_ids`` that restart instead.
    """
    count = draw(st.integers(1, 4) if rows is None else rows)
    width = draw(st.integers(1, 12) if length is None else length)
    row = st.lists(st.integers(1, vocabulary - 1), min_size=width, max_size=width)
    tokens = draw(st.lists(row, min_size=count, max_size=count))
    hidden = st.lists(st.booleans(), min_size=width, max_size=width)
    batch = {"input_ids": tokens, "labels": [_without(one, draw(hidden)) for one in tokens]}
    form = draw(st.sampled_from(["plain"] + ["padded"] * padded + ["packed"] * packed))
    if form == "padded":
        ends = [draw(st.integers(1, width)) for _ in range(count)]
        batch["attention_mask"] = [[1] * end + [0] * (width - end) for end in ends]
        batch["input_ids"] = [one[:end] + [0] * (width - end) for one, end in zip(tokens, ends, strict=True)]
        labels = zip(batch["labels"], ends, strict=True)
        batch["labels"] = [one[:end] + [IGNORED] * (width - end) for one, end in labels]
    elif form == "packed":
        batch["position_ids"] = [_restarting(draw(hidden)) for _ in range(count)]
    return batch


def _without(tokens: list[int], hidden: list[bool]) -> list[int]:
    return [IGNORED if left_out else token for token, left_out in zip(tokens, hidden, strict=True)]


def _restarting(restarts: list[bool]) -> list[int]:
    """Return positions that begin at 0 again where *restarts* says so."""
    positions: list[int] = []
    for again in restarts:
        positions.append(0 if again or not positions else positions[-1] + 1)
    return positions


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
