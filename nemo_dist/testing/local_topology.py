"""Fit the topology of a setup onto the few ranks of one machine, with every axis that is wide kept wide."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from nemo_dist.errors import TopologyError
from nemo_dist.planning.mesh_plan import MeshPlan
from nemo_dist.planning.sizes import ParallelismSizes
from nemo_dist.plugin.registry import Registry
from nemo_dist.setup.request import Request
from nemo_dist.setup.setup import DistributedSetup
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.shrink import HEADS

# The heads and the experts of a tiny model, which ranks share.
LARGEST: Mapping[str, int] = {"tp_size": HEADS, "ep_size": 4}
_SELECTING = ("strategy", "pipeline_config", "moe_parallel_config", "activation_checkpointing", "plugins")
_HERE = {"device_type": "cpu", "ranks": None, "timeout_minutes": None}


@attrs.frozen(kw_only=True, eq=False)
class LocalTopology:
    """The ``keywords`` of ``DistributedSetup.build`` for ranks of this machine, its ``setup``, and what was changed.

    ``asked`` are the user's own sizes.
    """

    keywords: Mapping[str, Any]
    setup: DistributedSetup
    asked: ParallelismSizes
    changes: tuple[str, ...] = ()


def fit(
    keywords: Mapping[str, Any], most: int, largest: Mapping[str, int], plan: MeshPlan | None = None
) -> LocalTopology:
    """Return the topology of *keywords* for at most *most* ranks: sizes stay where they fit, ``dp`` becomes 2 or so.

    No size is above that in *largest*. *plan* is the user's own, where *keywords* do not say how many ranks there are.
    Sizes become smaller before an axis that is wide there is given up; one that no topology of *most* ranks has room
    for is in ``changes``. Everything computes in float32, so that it can be compared with one process. Raises
    TopologyError when the setup itself is refused, or when *most* ranks are too few for all axes of the sizes.
    """
    sizes = _sizes(keywords)
    plan = _planned(keywords, sizes, plan)
    wide = {} if plan is None else {axis.name: axis.size for axis in plan.wide}
    refusals: list[TopologyError] = []
    found: list[LocalTopology] = []
    for tried in _tried(_at_most(sizes, largest), most):
        try:
            found.append(_topology(keywords, sizes, tried, tried.model_size * tried.dp(1)))
        except TopologyError as refusal:
            refusals.append(refusal)
            continue
        if not _given_up(found[-1], wide):
            break
    if found:
        chosen = min(found, key=lambda one: len(_given_up(one, wide)))  # of equals the first, with the largest sizes
        return attrs.evolve(chosen, changes=(*chosen.changes, *_shrunk(chosen, wide)))
    if refusals:
        raise refusals[0]
    raise TopologyError([f"every axis of {_words(sizes)} kept wide needs more than {most} ranks; allow more"])


def as_asked(keywords: Mapping[str, Any], plan: MeshPlan | None = None) -> DistributedSetup:
    """Return the setup of *keywords* with its own sizes, on CPUs: for the ranks of *plan*, or as few as it may have.

    Raises TopologyError where it is refused.
    """
    sizes, given = _sizes(keywords), {**keywords, **_HERE}
    if planned := _planned(keywords, sizes, plan):
        return DistributedSetup.build(**{**given, "world_size": planned.world_size})
    refusals: list[TopologyError] = []
    for dp in _data_parallel(sizes):
        given |= {"parallelism_sizes": attrs.evolve(sizes, dp_size=dp), "world_size": sizes.model_size * dp}
        try:
            return DistributedSetup.build(**given)
        except TopologyError as refusal:
            refusals.append(refusal)
    raise refusals[0]


def _sizes(keywords: Mapping[str, Any]) -> ParallelismSizes:
    return _with_roles(keywords, keywords.get("parallelism_sizes") or ParallelismSizes())


def _planned(keywords: Mapping[str, Any], sizes: ParallelismSizes, plan: MeshPlan | None) -> MeshPlan | None:
    """Return the plan of *keywords*, or else *plan*, or None where neither says how many ranks there are.

    Raises TopologyError for what is wrong with the user's own topology.
    """
    world = keywords.get("world_size")
    if world is None and sizes.dp_size is not None and plan is None:
        world = sizes.model_size * sizes.dp_size
    return plan if world is None else DistributedSetup.build(**{**keywords, "world_size": world}).plan


def _with_roles(keywords: Mapping[str, Any], sizes: ParallelismSizes) -> ParallelismSizes:
    """Return *sizes* with the roles that plugins give to axes of their own, which say how many ranks there are."""
    if not sizes.extra:
        return sizes
    options = {name: keywords[name] for name in _SELECTING if name in keywords}
    return Request.select(sizes, sizes.model_size, keywords.get("registry") or Registry(), **options).sizes


def _given_up(topology: LocalTopology, wide: Mapping[str, int]) -> list[str]:
    """Return the axes of *wide* that are not wide in *topology*."""
    kept = {axis.name for axis in topology.setup.plan.wide}
    return [axis for axis in wide if axis not in kept]


def _shrunk(topology: LocalTopology, wide: Mapping[str, int]) -> list[str]:
    """Say which axes of *wide* have another size in *topology*, where the sizes that the user gave do not say it."""
    there = {axis.name: axis.size for axis in topology.setup.plan.wide}
    lost = _given_up(topology, wide)
    told = {change.partition(":")[0].removesuffix("_size") for change in topology.changes}
    told |= {"dp_shard"} if "dp" in told else set()
    return [
        f"{axis}: {size} -> {there.get(axis, 1)}{', not proven' if axis in lost else ''}"
        for axis, size in wide.items()
        if axis in lost or (there[axis] != size and axis not in told | set(topology.asked.extra))
    ]


def _tried(sizes: ParallelismSizes, most: int) -> Iterator[ParallelismSizes]:
    """Yield *sizes* and ever smaller ones for at most *most* ranks, each with the data-parallel sizes to try."""
    for smaller in _smaller(sizes):
        for dp in _data_parallel(smaller):
            if smaller.model_size * dp <= most:
                yield attrs.evolve(smaller, dp_size=dp)


def only(topology: LocalTopology, axis: str) -> LocalTopology | None:
    """Return the topology with *axis* as its only wide axis, or None where the plugins refuse that."""
    sizes = topology.setup.parallelism_sizes
    plain = ParallelismSizes(extra=dict.fromkeys(sizes.extra, 1))
    if axis in ("dp_shard", "dp_replicate"):
        tried = attrs.evolve(plain, dp_size=2)
    elif axis == "ep":
        tried = attrs.evolve(plain, dp_size=sizes.ep_size, ep_size=sizes.ep_size)
    elif hasattr(sizes, f"{axis}_size"):
        tried = attrs.evolve(plain, dp_size=1, **{f"{axis}_size": getattr(sizes, f"{axis}_size")})
    else:
        return None
    try:
        return _topology(topology.keywords, sizes, tried, tried.model_size * tried.dp(1))
    except TopologyError:
        return None


def _topology(
    keywords: Mapping[str, Any], asked: ParallelismSizes, sizes: ParallelismSizes, world: int
) -> LocalTopology:
    given = {**keywords, **_HERE, "parallelism_sizes": sizes, "world_size": world}
    for axis, keyword in (("pp", "pipeline_config"), ("ep", "moe_parallel_config")):
        if getattr(sizes, f"{axis}_size") == 1:
            given.pop(keyword, None)
    setup = DistributedSetup.build(**given)
    changes = []
    config = setup.strategy_config
    if attrs.has(type(config)) and "mp_policy" in attrs.fields_dict(type(config)):
        given["strategy"] = attrs.evolve(config, mp_policy=FP32)
        setup = DistributedSetup.build(**given)
        changes.append("mp_policy: float32 throughout, as rounding to less would hide a difference")
    changes += [
        f"{field.name}: {getattr(asked, field.name)} -> {getattr(sizes, field.name)}"
        for field in attrs.fields(ParallelismSizes)
        if getattr(asked, field.name) not in (None, getattr(sizes, field.name)) and field.name != "roles"
    ]
    return LocalTopology(keywords=given, setup=setup, asked=asked, changes=tuple(changes))


def _at_most(sizes: ParallelismSizes, largest: Mapping[str, int]) -> ParallelismSizes:
    """Return *sizes* with each one of *largest* made a divisor of what is there to share, the greatest up to itself."""
    fitting = {
        name: max(size for size in range(1, there + 1) if there % size == 0 and size <= getattr(sizes, name))
        for name, there in largest.items()
    }
    return attrs.evolve(sizes, **fitting)


def _smaller(sizes: ParallelismSizes) -> Iterator[ParallelismSizes]:
    """Yield *sizes*, then ever smaller ones: each time the widest axis is divided by its least prime factor."""
    names = ("tp_size", "pp_size", "cp_size", "ep_size", "dp_replicate_size")
    while True:
        yield sizes
        wide = {name: size for name in names if (size := getattr(sizes, name) or 1) > _least_factor(size)}
        extra = {axis: size for axis, size in sizes.extra.items() if size > _least_factor(size)}
        if not wide and not extra:
            return
        if wide and (not extra or max(wide.values()) >= max(extra.values())):
            name = max(wide, key=lambda one: wide[one])
            sizes = attrs.evolve(sizes, **{name: wide[name] // _least_factor(wide[name])})
        else:
            axis = max(extra, key=lambda one: extra[one])
            sizes = attrs.evolve(sizes, extra={**sizes.extra, axis: extra[axis] // _least_factor(extra[axis])})


def _data_parallel(sizes: ParallelismSizes) -> list[int]:
    """Return the data-parallel sizes to try: 2, then the least, then what replicas or experts need."""
    replicate = sizes.dp_replicate_size or 1
    wanted = [2 * replicate, replicate, 2, 1, sizes.ep_size, 2 * sizes.ep_size]
    if sizes.dp_size == 1:
        wanted = [1]
    return list(dict.fromkeys(dp for dp in wanted if dp % replicate == 0))


def _least_factor(size: int) -> int:
    return next((factor for factor in range(2, size) if size % factor == 0), size)


def _words(sizes: ParallelismSizes) -> str:
    wide = {f.name: getattr(sizes, f.name) for f in attrs.fields(ParallelismSizes) if f.name.endswith("_size")}
    return ", ".join(f"{name} {size}" for name, size in wide.items() if size not in (None, 1)) or "the sizes"
