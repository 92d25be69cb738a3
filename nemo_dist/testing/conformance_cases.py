"""The setups in which the conformance kit trains: the axes of a plugin wide, and all that it says it composes with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from nemo_dist.planning.sizes import ParallelismSizes
from nemo_dist.plugin.protocol import Stage
from nemo_dist.testing.precision import in_float32
from nemo_dist.testing.selecting import MODEL_AXES, RECOMPUTE, partners_of

_EXPERTS = "qwen3-moe"


@attrs.frozen(kw_only=True)
class Case:
    """A setup to train in: its name in messages, the keywords of ``build``, the number of ranks and the model."""

    name: str
    build: Mapping[str, Any]
    world: int
    specimen: str


def composed_cases(plugin: Any, build: Mapping[str, Any], world: int, specimen: str) -> Iterator[Case]:
    """Yield the setups on twice the ranks and with whatever else the class *plugin* says that it composes with.

    ``build`` on *world* ranks is how it is selected alone; every case changes one thing of it.
    """
    sizes = build.get("parallelism_sizes", ParallelismSizes())

    def case(name: str, changes: Mapping[str, Any], ranks: int, model: str = specimen) -> Case:
        return Case(name=name, build={**build, **changes}, world=ranks, specimen=model)

    def sized(**more: int) -> dict[str, Any]:
        return {"parallelism_sizes": attrs.evolve(sizes, **more)}

    yield case(f"{2 * world} ranks", {}, 2 * world)
    if plugin.stage != Stage.DATA:
        for other in partners_of(plugin):
            if other != getattr(build.get("strategy"), "plugin", build.get("strategy")):
                yield case(f"strategy {other}", {"strategy": in_float32(other)}, world)
        return
    if "dp_replicate" in plugin.axes | plugin.composes_with:
        yield case("dp_replicate_size=2", sized(dp_replicate_size=2), 2 * world)
    for axis in MODEL_AXES:
        if axis in plugin.composes_with and getattr(sizes, f"{axis}_size") == 1:
            yield case(
                f"{axis}_size=2", sized(**{f"{axis}_size": 2}), 2 * world, _EXPERTS if axis == "ep" else specimen
            )
    if RECOMPUTE in plugin.composes_with:
        yield case(RECOMPUTE, {RECOMPUTE: True}, world)
