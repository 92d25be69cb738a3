"""Prove a setup for a model on this machine: train on ranks and on one process, compare, and name the first departure.

::

    from nemo_dist import DistributedSetup, ParallelismSizes
    from nemo_dist.testing import verify

    setup = DistributedSetup.build(parallelism_sizes=ParallelismSizes(tp_size=2), world_size=64)
    report = verify(setup, AutoConfig.from_pretrained("meta-llama/Llama-3.2-1B"))
    assert report.ok, report
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import attrs
import torch
import torch.distributed as dist
from transformers import AutoConfig

import nemo_dist
from nemo_dist.dry_run.trial import refusals
from nemo_dist.errors import RankError, TopologyError
from nemo_dist.models.meta_model import in_one_line, meta_model
from nemo_dist.plugin.registry import Registry
from nemo_dist.setup.config_section import build_keywords
from nemo_dist.setup.setup import DistributedSetup
from nemo_dist.testing.comparison import Check, Comparison, told
from nemo_dist.testing.layouts import Tokens
from nemo_dist.testing.local_topology import LARGEST, LocalTopology, as_asked, fit, only
from nemo_dist.testing.localise import Culprit, Part, Search
from nemo_dist.testing.pool import RankPool
from nemo_dist.testing.proof_run import STEPS, Around, Result, Work, joined, run_alone, run_on_rank
from nemo_dist.testing.tiny_work import loader_of, make_work

TIMEOUT = 600.0  # seconds
RANKS = 8  # at most, unless the caller allows more


@attrs.frozen(kw_only=True)
class Report:
    """The result of ``verify``; as a string it is what ``nemo-dist verify`` prints.

    ``topology``: the ranks and sizes that ran. ``changes``: what was made smaller or plainer, so that it is not proven
    as it is. ``checks``: what was compared. ``culprit``: the first module and axis that depart. ``unsearched``: why
    these are known by the numbers alone, where the repeat that records modules failed. ``refused``: the reasons why the
    setup does not take this model, when it does not.
    """

    topology: str
    changes: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()
    culprit: Culprit | None = None
    unsearched: str | None = None
    refused: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether everything was run and agrees."""
        return not self.refused and bool(self.checks) and all(check.ok for check in self.checks)

    def __str__(self) -> str:
        lines = [self.topology, *(f"  changed: {change}" for change in self.changes)]
        lines += [f"refused: {reason}" for reason in self.refused]
        lines += [str(check) for check in self.checks]
        if self.culprit:
            lines.append(f"first departure: {self.culprit}")
        if self.unsearched:
            lines.append(f"the search for the first departure failed: {self.unsearched}")
        verdict = "equal to one process" if self.ok else "refused" if self.refused else "NOT equal to one process"
        return "\n".join([*lines, f"{verdict} ({self.seconds:.0f} s)"])


def verify(
    setup: DistributedSetup | Mapping[str, Any],
    config: Any,
    *,
    full: bool = False,
    ranks: int = RANKS,
    pool: Any = None,
    around: Around | None = None,
) -> Report:
    """Prove that *setup* trains a model of *config* as one process does; run on ranks of this machine, on the CPU.

    ``setup``: a DistributedSetup for any number of ranks, or the keywords of ``DistributedSetup.build``. ``config``: a
    transformers config, or the folder or hub name to read one from. First the model is tried as it is, without weights,
    on the setup as it is: what refuses that is the result. Then the model is made tiny, with the same structure, unless
    *full*; the topology is made smaller until it has at most *ranks* ranks, and every axis that is wide stays wide.
    ``pool(world_size)`` returns the ranks to use, as the fixture ``ranks`` of the pytest plugin does; by default they
    are started, and end with the call. ``around`` is entered on every rank around the whole run.

    Compared are loss, every gradient by name, the clipped norm, three AdamW steps, one more after a save and a load
    into a new model, and the export. Where they differ, the run is repeated with the outputs and gradients of all
    modules recorded, and the first departure is named.
    """
    start = time.monotonic()
    if isinstance(config, str | os.PathLike):
        config = AutoConfig.from_pretrained(config)
    keywords = build_keywords(setup.to_dict(), Registry()) if isinstance(setup, DistributedSetup) else dict(setup)
    plan = setup.plan if isinstance(setup, DistributedSetup) else None
    try:
        topology = fit(keywords, ranks, {} if full else LARGEST, plan)
        asked = as_asked(keywords, plan)
    except TopologyError as refusal:
        return Report(topology="no topology", refused=refusal.problems, seconds=time.monotonic() - start)
    refused, untried = _tried_as_it_is(asked, config)
    if refused:
        shown = f"{_shown(asked)}, the model as it is"
        return Report(topology=shown, refused=refused, seconds=time.monotonic() - start)
    work, changes = make_work(config, topology.setup.plan, topology.asked, full=full)
    report = _Proof(topology=topology, work=work, pool=pool or _Started, around=around).report()
    return attrs.evolve(report, changes=(*topology.changes, *untried, *changes), seconds=time.monotonic() - start)


def _tried_as_it_is(setup: DistributedSetup, config: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return why *setup* refuses the model of *config* with its real sizes, and what to say where that is not known."""
    if dist.is_initialized():
        return (), ("real sizes: not tried, as this process has a process group",)
    auto = getattr(nemo_dist, loader_of(config)).auto
    try:
        with redirect_stdout(StringIO()):
            return refusals(setup, lambda: meta_model(config, torch.float32, auto)), ()
    except Exception as error:  # of a model whose code does not run without weights
        return (), (f"real sizes: not tried without weights ({in_one_line(error)})",)


@attrs.frozen
class _Started:
    """Ranks that start for one call of ``run``."""

    world_size: int

    def run(self, *args: Any, **kwargs: Any) -> list[Any]:
        with RankPool(self.world_size) as pool:
            return pool.run(*args, **kwargs)


@attrs.frozen(kw_only=True, eq=False)
class _Proof:
    """Run *work* on ranks of *topology* and on one process, and compare."""

    topology: LocalTopology
    work: Work
    pool: Any
    around: Around | None

    def report(self) -> Report:
        shown = f"{_shown(self.topology.setup)}, against one process"
        try:
            results = self._on_ranks(self.work)
        except RankError as error:
            return Report(topology=shown, checks=(Check(what="run", ok=False, found=str(error)),))
        refused = tuple(dict.fromkeys(result.refused.removeprefix("- ") for result in results if result.refused))
        if refused:
            return Report(topology=shown, refused=refused)
        comparison = self._compared(results)
        export, wrong = comparison.exported(self.work.folder / "export", self.work.load)
        culprit, unsearched = self._found(comparison)
        unsaved = [
            Check(what="save", ok=False, found=error) for error in {result.unsaved for result in results} if error
        ]
        return Report(
            topology=shown,
            checks=(*comparison.checks(), *unsaved, export),
            culprit=culprit or wrong,
            unsearched=unsearched,
        )

    def _found(self, comparison: Comparison) -> tuple[Culprit | None, str | None]:
        """Return the first departure and, where the search for it failed, why: what was compared is told anyway."""
        try:
            return self._culprit(comparison), None
        except Exception as error:  # of ranks, of one process with hooks on every module, or of the search itself
            return comparison.culprit(), told(error)

    def _on_ranks(self, work: Work) -> list[Result]:
        world = self.topology.setup.plan.world_size
        with redirect_stdout(StringIO()):  # the pool prints what ranks print
            found: list[Result] = self.pool(world).run(
                run_on_rank, work, self.topology.keywords, work.folder, self.around, timeout=TIMEOUT
            )
        return found

    def _compared(self, results: list[Result]) -> Comparison:
        single, other = self._alone(self.work)
        return Comparison(single=single, other=other, results=results, plan=self.topology.setup.plan)

    def _alone(self, work: Work) -> tuple[Result, Result]:
        """Return the result of one process, and another one that differs from it as much as rounding can explain."""
        single = run_alone(work)
        try:
            return single, run_alone(work, torch.float64)
        except (RuntimeError, NotImplementedError):  # a kernel without float64
            return single, run_alone(work, nudged=True)

    def _culprit(self, comparison: Comparison) -> Culprit | None:
        """Repeat the first step that departs with every module recorded, and search for the first departure."""
        departed = comparison.first
        if departed is None:
            return None
        search = self._search(departed.step)
        found = None
        if search is not None:
            found = search.forward() or (None if departed.what == "loss" else search.backward())
        found = found or comparison.culprit()
        if found is None or found.axis is not None:
            return found
        axes = [axis.name for axis in self.topology.setup.plan.wide if self._departs_with_only(axis.name)]
        if not axes:
            return found
        # Experts are shared by ranks that read different batches, so what departs without experts is not theirs.
        axis = " or ".join(axis for axis in axes if axis != "ep") or "ep"
        return attrs.evolve(found, axis=axis, why=f"{found.why}; a run with no other axis departs too")

    def _search(self, step: int) -> Search | None:
        if not 0 <= step < STEPS:
            return None  # the weights are wrong, or what was saved: not what modules compute
        work = attrs.evolve(self.work, traced=step)
        results = self._on_ranks(work)
        single, other = self._alone(work)
        rows, length = joined(work.batches[step])["input_ids"].shape
        parts = [
            Part(rank=rank, trace=trace, tokens=Tokens(own=result.tokens, rows=rows, length=length))
            for rank, result in enumerate(results)
            for trace in result.traces
            if result.tokens is not None
        ]
        return Search(
            single=single.traces[0],
            other=other.traces[0],
            parts=parts,
            plan=self.topology.setup.plan,
        )

    def _departs_with_only(self, axis: str) -> bool:
        """Whether the run also departs where *axis* is the only wide one."""
        topology = only(self.topology, axis)
        if topology is None:
            return False
        alone = attrs.evolve(self, topology=topology)
        results = alone._on_ranks(self.work)
        return not any(result.refused for result in results) and alone._compared(results).first is not None


def _shown(setup: DistributedSetup) -> str:
    sizes = ", ".join(f"{axis.name} {axis.size}" for axis in setup.plan.wide)
    plugins = ", ".join(plugin.name for plugin in setup.plugins)
    return f"{setup.plan.world_size} ranks ({sizes or 'no axis'}), plugins: {plugins}"
