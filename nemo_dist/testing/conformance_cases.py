"""The setups in which the conformance kit trains: the axes of a plugin wide, and all that it says it composes with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import attrs

from nemo_dist.planning.mesh_plan import DENSE_AXES
from nemo_dist.planning.sizes import ParallelismSizes
from nemo_dist.plugin.protocol import Stage
from nemo_dist.plugin.registry import Registry
from nemo_dist.setup.setup import DistributedSetup
from nemo_dist.testing.kit_adapters import adapted, targets
from nemo_dist.testing.precision import in_float32
from nemo_dist.testing.selecting import MODEL_AXES, RECOMPUTE, is_accepted, own_axes, partners_of, smallest
from nemo_dist.testing.tiny_models import SPECIMENS

_EXPERTS = "qwen3-moe"
SELECTIVE = f"{RECOMPUTE}:selective"
ADAPTERS = "adapters"
_KNOWN = frozenset({*DENSE_AXES, *MODEL_AXES, RECOMPUTE, SELECTIVE, ADAPTERS})


@attrs.frozen(kw_only=True)
class Case:
    """A setup to train in: its name in messages, the keywords of ``build``, the number of ranks and the model.

    ``named``: the plugin says that it composes with it. What it only accepts in ``build`` may be refused at load.
    ``strategy``: the name of the one that is tried, if it is another than usual; it may not run on this machine.
    ``adapters``: whether those of PEFT are trained.
    """

    name: str
    build: Mapping[str, Any]
    world: int
    specimen: str
    named: bool = True
    strategy: str | None = None
    adapters: bool = False


@attrs.frozen(kw_only=True)
class Untried:
    """What a plugin says that it composes with, or claims, and the kit cannot try; ``why`` not."""

    word: str
    why: str

    def __str__(self) -> str:
        return f"{self.word!r} ({self.why})"


def composed_cases(plugin: Any, build: Mapping[str, Any], world: int, specimen: str) -> list[Case | Untried]:
    """Return the setups on twice the ranks, with each axis of its own, and with all that the class *plugin* names.

    For a strategy that is what it composes with. A plugin beside one says which strategies it composes with; of their
    axes and recomputation it is tried with all that ``build`` accepts. ``build`` on *world* ranks is how it is selected
    alone; every case changes one thing of it. What cannot be tried is there too, with the reason.
    """
    return list(_Cases(plugin=plugin, build=build, world=world, specimen=specimen).all())


@attrs.frozen(kw_only=True, eq=False)
class _Cases:
    plugin: Any
    build: Mapping[str, Any]
    world: int
    specimen: str

    def all(self) -> Iterator[Case | Untried]:
        found = [*self._own_axes(), *self._words(), *self._strategies(), *self._changed()]
        yield self._case(f"{2 * self.world} ranks", {}, 2)
        yield from found
        cases = [one for one in (*found, self._case("", {}), self._case("", {}, 2)) if isinstance(one, Case)]
        wide = {axis for case in cases for axis in _wide(case)}
        for axis in sorted(self.plugin.axes - wide):
            yield Untried(word=axis, why=f"no setup of up to {2 * self.world} ranks in which it is wide")

    def _case(self, name: str, changes: Mapping[str, Any], times: int = 1, **more: Any) -> Case:
        build = {**self.build, **changes}
        return Case(**{"name": name, "build": build, "world": times * self.world, "specimen": self.specimen, **more})

    @property
    def _is_strategy(self) -> bool:
        return bool(self.plugin.stage == Stage.DATA)

    @property
    def _sizes(self) -> ParallelismSizes:
        sizes: ParallelismSizes = self.build.get("parallelism_sizes", ParallelismSizes())
        return sizes

    def _strategies(self) -> Iterator[Case]:
        """Yield the setups with another strategy, for a plugin beside one."""
        for other in () if self._is_strategy else partners_of(self.plugin):
            if other != getattr(self.build.get("strategy"), "plugin", self.build.get("strategy")):
                yield self._case(f"strategy {other}", {"strategy": in_float32(other)}, strategy=other)

    def _changed(self) -> Iterator[Case]:
        """Yield the setups with recomputation and wider axes that the plugin names or, beside a strategy, takes."""
        words = self.plugin.axes | self.plugin.composes_with
        found = [
            self._case(RECOMPUTE, {RECOMPUTE: True}, named=RECOMPUTE in words),
            self._case(SELECTIVE, {RECOMPUTE: "selective"}, named=SELECTIVE in words),
        ]
        for axis in ("dp_replicate", *MODEL_AXES):
            size = f"{axis}_size"
            if (getattr(self._sizes, size) or 1) == 1:
                changes = {"parallelism_sizes": attrs.evolve(self._sizes, **{size: 2})}
                model = _EXPERTS if axis == "ep" else self.specimen
                found.append(self._case(f"{size}=2", changes, 2, named=axis in words, specimen=model))
        for one in found:
            if one.named or (not self._is_strategy and is_accepted(one.build, one.world)):
                yield one

    def _own_axes(self) -> Iterator[Case]:
        """Yield the setups with another axis of the plugin's own at size 2."""
        for axis in own_axes(self.plugin):
            if self._sizes.extra.get(axis, 1) == 1:
                yield from _first_accepted(self._with_axis(axis))

    def _words(self) -> Iterator[Case | Untried]:
        """Yield the setups with adapters, and with axes and plugins of others that the plugin names."""
        words = self.plugin.composes_with - self.plugin.axes
        if ADAPTERS in words:
            yield _lacking(self.specimen) or self._case(ADAPTERS, {}, adapters=True)
        for word in sorted(words - _KNOWN - set(partners_of(self.plugin))):
            tries = [*self._with_axis(word), *self._beside(word)] if self._is_strategy else []
            accepted = _first_accepted(tries)
            yield accepted[0] if accepted else Untried(word=word, why=_UNKNOWN)

    def _with_axis(self, axis: str) -> list[Case]:
        """Return the setups with *axis* alone of ``extra`` at size 2: on as many ranks, and on twice as many."""
        if not axis.isidentifier():
            return []
        extra = {**dict.fromkeys(self._sizes.extra, 1), axis: 2}
        changes = {"parallelism_sizes": attrs.evolve(self._sizes, extra=extra)}
        return [self._case(f"{axis}=2", changes, times) for times in (1, 2)]

    def _beside(self, name: str) -> list[Case]:
        """Return the setups of a strategy with the plugin *name*, if it is installed."""
        if name not in Registry():
            return []
        changes = {**smallest(name), "strategy": self.build["strategy"]}
        return [self._case(f"plugin {name}", changes, times) for times in (1, 2)]


_UNKNOWN = "no plugin, strategy or axis that is installed, and no option that the kit knows of"


def _lacking(specimen: str) -> Untried | None:
    """Return why *specimen* cannot have adapters here, if so."""
    if find_spec("peft") is None:
        return Untried(word=ADAPTERS, why="peft is not installed")
    if not targets(specimen):
        return Untried(word=ADAPTERS, why=f"{specimen!r} has no linear layer in its blocks")
    try:
        adapted(SPECIMENS[specimen].make(), specimen)
    except ValueError as refusal:  # PEFT's, for layers of this family
        return Untried(word=ADAPTERS, why=f"{specimen!r}: {refusal}")
    return None


def _first_accepted(cases: list[Case]) -> list[Case]:
    return [one for one in cases if is_accepted(one.build, one.world)][:1]


def _wide(case: Case) -> set[str]:
    """Return the axes that are wide in *case*; none where ``build`` refuses it."""
    if not is_accepted(case.build, case.world):
        return set()
    return {axis.name for axis in DistributedSetup.build(**case.build, world_size=case.world).plan.wide}
