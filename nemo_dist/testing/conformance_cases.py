"""The setups in which the conformance kit trains: the axes of a plugin wide, and all that it says it composes with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from nemo_dist.planning.sizes import ParallelismSizes
from nemo_dist.plugin.protocol import Stage
from nemo_dist.testing.precision import in_float32
from nemo_dist.testing.selecting import MODEL_AXES, RECOMPUTE, is_accepted, partners_of

_EXPERTS = "qwen3-moe"


@attrs.frozen(kw_only=True)
class Case:
    """A setup to train in: its name in messages, the keywords of ``build``, the number of ranks and the model.

    ``named``: the plugin says that it composes with it. What it only accepts in ``build`` may be refused at load.
    ``strategy``: the name of the one that is tried, if it is another than usual; it may not run on this machine.
    """

    name: str
    build: Mapping[str, Any]
    world: int
    specimen: str
    named: bool = True
    strategy: str | None = None


def composed_cases(plugin: Any, build: Mapping[str, Any], world: int, specimen: str) -> Iterator[Case]:
    """Yield the setups on twice the ranks, and with whatever else the class *plugin* composes with.

    For a strategy that is what it says. A plugin beside one says which strategies it composes with; of their axes and
    recomputation it is tried with all that ``build`` accepts. ``build`` on *world* ranks is how it is selected alone;
    every case changes one thing of it.
    """
    sizes = build.get("parallelism_sizes", ParallelismSizes())
    is_strategy = plugin.stage == Stage.DATA

    def case(name: str, changes: Mapping[str, Any], ranks: int, **more: Any) -> Case:
        return Case(**{"name": name, "build": {**build, **changes}, "world": ranks, "specimen": specimen, **more})

    yield case(f"{2 * world} ranks", {}, 2 * world)
    for other in () if is_strategy else partners_of(plugin):
        if other != getattr(build.get("strategy"), "plugin", build.get("strategy")):
            yield case(f"strategy {other}", {"strategy": in_float32(other)}, world, strategy=other)
    changed = [case(RECOMPUTE, {RECOMPUTE: True}, world, named=RECOMPUTE in plugin.composes_with)]
    for axis in ("dp_replicate", *MODEL_AXES):
        size = f"{axis}_size"
        if (getattr(sizes, size) or 1) == 1:
            changes = {"parallelism_sizes": attrs.evolve(sizes, **{size: 2})}
            named = axis in plugin.axes | plugin.composes_with
            model = _EXPERTS if axis == "ep" else specimen
            changed.append(case(f"{size}=2", changes, 2 * world, named=named, specimen=model))
    for one in changed:
        if one.named or (not is_strategy and is_accepted(one.build, one.world)):
            yield one
