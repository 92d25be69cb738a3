"""What all tests of the conformance kit share: the plugin, how it is selected and trained, and the comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import attrs

from nemo_dist.plugin.protocol import declared
from nemo_dist.plugin.registry import Registry
from nemo_dist.setup.setup import DistributedSetup
from nemo_dist.testing import conformance_runs as runs
from nemo_dist.testing import laws
from nemo_dist.testing.conformance_cases import Case
from nemo_dist.testing.conformance_runs import Stretch
from nemo_dist.testing.diagnosis import hints
from nemo_dist.testing.equivalence import (
    TOLERANCE,
    Outcome,
    Task,
    checkpoint,
    differences,
    mean_of_replicas,
    merged,
    reference,
    train_on_rank,
    trained,
)
from nemo_dist.testing.selecting import smallest

Ranks = Callable[[int], Any]
DIFFER = "its replicas differ by design, so that there is nothing that they must be equal to"


class Kit:
    """The options of the conformance tests (``PluginConformance``), and what the tests share."""

    plugin: ClassVar[str]
    build: ClassVar[Mapping[str, Any] | None] = None
    world: ClassVar[int] = 2
    specimen: ClassVar[str] = "llama"
    bound: ClassVar[float | None] = None
    alone: ClassVar[bool] = False
    frozen: ClassVar[tuple[str, ...]] = ()

    @property
    def plugin_type(self) -> Any:
        """The registered plugin class."""
        return Registry().load(self.plugin)

    def selecting(self) -> dict[str, Any]:
        """Return the keywords of ``build`` that select the plugin."""
        return dict(smallest(self.plugin) if self.build is None else self.build)

    def instance(self) -> Any:
        """Return the plugin with the options that ``selecting`` gives it."""
        setup = DistributedSetup.build(**self.selecting(), world_size=self.world)
        return next(plugin for plugin in setup.plugins if plugin.name == self.plugin)

    def task(self, **more: Any) -> Task:
        """Return what to train."""
        return Task(**{"specimen": self.specimen, "frozen": self.frozen, **more})

    @property
    def _error(self) -> float:
        """The relative error that is allowed."""
        if declared(self.instance(), "exact") or self.alone:
            return TOLERANCE
        if self.bound is None:
            raise laws.BOUND.broken(
                self.plugin, ["exact is False, and the kit has no bound"], ["bound = ..., or alone = True, on the kit"]
            )
        return self.bound

    def _compare(self, law: laws.Law, ranks: Ranks, task: Task, case: Case | None = None) -> None:
        """Train *task* on ranks and on one process, and raise what *law* says where they differ."""
        build, world = (self.selecting(), self.world) if case is None else (case.build, case.world)
        where = f"{world} ranks, {build}"
        plugin = self.instance()
        with law.judging(self.plugin):
            outcomes = ranks(world).run(train_on_rank, task, checkpoint(task.specimen, task.seed), build)
            found = mean_of_replicas(outcomes) if declared(plugin, "replicas_differ") else merged(outcomes)
        expected = self._expected(ranks, task)
        lines = _different(found, expected, self._error, differ=declared(plugin, "replicas_differ"))
        told = hints(found, expected, build, world) if lines else []
        law.hold(self.plugin, [f"on {where}:", *lines] if lines else [], told)
        if law is laws.PARITY and not declared(plugin, "exact"):
            exact = not _different(found, reference(task), TOLERANCE, differ=declared(plugin, "replicas_differ"))
            laws.BOUND.hold(
                self.plugin, [f"every number is within {TOLERANCE} of that of one process"] if exact else []
            )

    def _expected(self, ranks: Ranks, task: Task) -> Outcome:
        """Return what *task* gives in one process, with the plugin where it is to be compared with itself alone."""
        return trained(ranks(1), task, **self._on_one_rank()) if self.alone else reference(task)

    def _on_one_rank(self) -> dict[str, Any]:
        return {name: value for name, value in self.selecting().items() if name != "parallelism_sizes"}

    def _by_one_process(self, ranks: Ranks, on_rank: Callable[..., Any], plain: Callable[..., Any]) -> Any:
        """Return what *plain* gives of the task and its weights; or *on_rank*, for a plugin compared with itself."""
        given = self.task(), checkpoint(self.task().specimen)
        if not self.alone:
            return plain(*given)
        (found,) = ranks(1).run(on_rank, *given, self._on_one_rank())
        return found

    def _hold_on_ranks(self, law: laws.Law, ranks: Ranks, function: Callable[..., list[str]]) -> None:
        """Raise what *law* says where *function* returns lines on a rank."""
        task = self.task()
        with law.judging(self.plugin):
            found = ranks(self.world).run(function, task, checkpoint(task.specimen), self.selecting())
        law.hold(self.plugin, [f"rank {rank}: {line}" for rank, lines in enumerate(found) for line in lines])

    def _run(
        self,
        ranks: Ranks,
        run: Path,
        stretches: Sequence[tuple[Mapping[str, Any], Stretch]],
        task: Task | None = None,
    ) -> Any:
        task = task or self.task()
        weights = checkpoint(task.specimen, task.seed)
        return ranks(self.world).run(runs.on_rank_stretches, task, weights, run, stretches)


def _different(found: Outcome, expected: Outcome, error: float, *, differ: bool) -> list[str]:
    """Return the differences above *error*; of replicas that differ only losses and parameters are compared."""
    if differ:
        found = attrs.evolve(found, norms=expected.norms, gradients=expected.gradients)
    return differences(found, expected, error)


def close(one: tuple[float, float], other: tuple[float, float], error: float) -> bool:
    """Whether two numbers are those of another pair, within the relative *error*."""
    return all(abs(a - b) <= error * abs(b) for a, b in zip(one, other, strict=True))


def settings_of(model: Any) -> dict[str, Any]:
    """Return the settings of *model* by name, but for where it was loaded from."""
    return {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
