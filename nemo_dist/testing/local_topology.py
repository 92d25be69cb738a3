"""Fit the topology of a setup onto the few ranks of one machine, with every axis that is wide kept wide."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from nemo_dist.errors import TopologyError
from nemo_dist.planning.sizes import ParallelismSizes
from nemo_dist.setup.setup import DistributedSetup
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.shrink import HEADS

# The heads and the experts of a tiny model, which ranks share.
LARGEST: Mapping[str, int] = {"tp_size": HEADS, "ep_size": 4}
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


def fit(keywords: Mapping[str, Any], most: int, largest: Mapping[str, int]) -> LocalTopology:
    """Return the topology of *keywords* for at most *most* ranks: sizes stay where they fit, ``dp`` becomes 2 or so.

    No size is above that in *largest*. Everything computes in float32, so that it can be compared with one process.
    Raises TopologyError when the setup itself is refused, or when *most* ranks are too few for all of its axes.
    """
    sizes = keywords.get("parallelism_sizes") or ParallelismSizes()
    if keywords.get("world_size") is not None:
        DistributedSetup.build(**keywords)  # raises for what is wrong with the user's own topology
    refusals: list[TopologyError] = []
    for smaller in _smaller(_at_most(sizes, largest)):
        for dp in _data_parallel(smaller):
            tried = attrs.evolve(smaller, dp_size=dp)
            world = tried.model_size * dp
            if world > most:
                continue
            try:
                return _topology(keywords, sizes, tried, world)
            except TopologyError as refusal:
                refusals.append(refusal)
    if refusals:
        raise refusals[0]
    raise TopologyError([f"every axis of {_words(sizes)} kept wide needs more than {most} ranks; allow more"])


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
