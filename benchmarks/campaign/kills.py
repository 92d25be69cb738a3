"""Kill a run at a random moment of everything that it does, resume it, and kill it again.

The runs go on for the whole row in one folder, so that what one kill leaves is there at the next. A run computes the
same bits whatever it died of: every rank tells a digest of each step that it saves, and one that resumes a step, or
computes it once more, must have that digest.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import attrs

from campaign.forks import Fork, end, fork, listen, until
from campaign.remains import wrong_with
from campaign.tally import Tally
from campaign.tiny_run import TinyRun, checksum
from nemo_dist import RunFolder
from nemo_dist.checkpoint import atomic_dir
from nemo_dist.checkpoint.atomic_dir import Staging
from nemo_dist.testing.tensors import saved_weights

_NOTES = "what the user put here"
_GRACE = 5.0  # seconds between SIGTERM and kill -9, as of a scheduler in a hurry
_SLOW = 0.03  # seconds of a slow rename


@attrs.frozen
class Operation:
    """What a run does when it is killed: *work* is called again and again, in a world of *world* ranks."""

    work: Callable[[TinyRun, Path, Callable[..., None]], None]
    world: int = 1
    sizes: Mapping[str, int] = attrs.field(factory=dict)
    slow: bool = False


def _save(run: TinyRun, folder: RunFolder, tell: Callable[..., None], asynchronous: bool = False) -> None:
    tell("saving", run.step, run.digest())
    run.save(folder, asynchronous=asynchronous)
    if not asynchronous:
        tell("saved", run.step)


def step(run: TinyRun, path: Path, tell: Callable[..., None]) -> None:
    """Train, and save every now and then."""
    run.train()
    if run.step % 10 == 0:
        _save(run, RunFolder(path / "run", keep_last=2), tell)


def save(run: TinyRun, path: Path, tell: Callable[..., None]) -> None:
    """Train a step, and save it."""
    run.train()
    _save(run, RunFolder(path / "run", keep_last=2), tell)


def save_in_the_background(run: TinyRun, path: Path, tell: Callable[..., None]) -> None:
    """Train a step while the one before is saved; that one is durable when the next save begins."""
    run.train()
    before = run.step - 1
    _save(run, RunFolder(path / "run", keep_last=2), tell, asynchronous=True)
    if before > run.begun:
        tell("saved", before)


def prune(run: TinyRun, path: Path, tell: Callable[..., None]) -> None:
    """Save some steps, and one that removes them all."""
    for keep in (None, None, 1):
        run.train()
        _save(run, RunFolder(path / "run", keep_last=keep), tell)


def export(run: TinyRun, path: Path, tell: Callable[..., None]) -> None:
    """Export over what was exported before."""
    run.train()
    tell("exporting", checksum(run.weights()))
    run.runtime.export(path / "exported")


def resume(run: TinyRun, path: Path, tell: Callable[..., None]) -> None:
    """Load the newest checkpoint again."""
    run.resume(RunFolder(path / "run"))
    tell("found", run.step, run.digest())


def load(run: TinyRun, path: Path, tell: Callable[..., None]) -> None:
    """Load the exported model into a new one."""
    TinyRun(origin=path / "exported")


OPERATIONS = {
    "load": Operation(load),
    "step": Operation(step, world=2),
    "schedule (pp 2)": Operation(step, world=2, sizes={"pp_size": 2}),
    "save": Operation(save),
    "save, 2 ranks": Operation(save, world=2),
    "save, slow renames": Operation(save, slow=True),
    "asynchronous save": Operation(save_in_the_background),
    "asynchronous save, 2 ranks": Operation(save_in_the_background, world=2),
    "prune": Operation(prune),
    "export": Operation(export),
    "export, slow renames": Operation(export, slow=True),
    "resume": Operation(resume),
}


def run(count: int, chance: Random, folder: Path) -> Iterator[Tally]:
    """Kill runs at *count* moments of each operation, half of them with each signal."""
    for index, (name, operation) in enumerate(OPERATIONS.items()):
        for number, called in ((signal.SIGKILL, "kill -9"), (signal.SIGTERM, "SIGTERM")):
            tally = Tally(f"{called}: {name}")
            row = _Row(operation, folder / f"kill-{index}-{called}")
            row.prepare()
            for _ in range(max(1, count // 2)):
                row.kill_once(number, chance, tally)
            yield tally


@attrs.define
class _Row:
    """The lives of one run: what its ranks told, and what must be found after each of its deaths."""

    operation: Operation
    path: Path
    digests: dict[tuple[int, int], int] = attrs.field(factory=dict)
    exports: set[int] = attrs.field(factory=set)
    durable: int = 0
    lasted: list[float] = attrs.field(factory=lambda: [0.05])

    def prepare(self) -> None:
        """Have a run save a step and export, and put a file of the user beside each."""
        self.path.mkdir(parents=True)
        self._take(self._life(lambda forks: until(forks, _said("ready"), 300)))
        for place in ("run", "exported"):
            (self.path / place / "notes.txt").write_text(_NOTES)

    def kill_once(self, number: int, chance: Random, tally: Tally) -> None:
        """Start the run, kill it at a random moment, and look at what is left."""
        delay = chance.uniform(0, 2 * median(self.lasted[-20:]))
        alone = chance.random() < 0.3

        def kill(forks: list[Fork]) -> None:
            if until(forks, _said("ready")):
                listen(forks, delay)
            if alone:
                chance.choice(forks).kill(number)
                listen(forks, 0.02)
            end(forks, number, grace=_GRACE if number == signal.SIGTERM else 0.0)

        handler = number == signal.SIGTERM and chance.random() < 0.5
        problem = self._take(self._life(kill, handler)) or self._left()
        tally.lose(f"after {delay:.3f} s: {problem}") if problem else tally.survive()

    def _life(self, until_then: Callable[[list[Fork]], Any], handler: bool = False) -> list[Fork]:
        forks = fork(self.operation.world, _live, self.operation, self.path, handler)
        until_then(forks)
        end(forks)
        return forks

    def _take(self, forks: list[Fork]) -> str:
        """Take in what *forks* told; return what is wrong with it."""
        saved = []
        for rank, one in enumerate(forks):
            saved.append(self.durable)
            for word, *said in one.told:
                if word == "raised" and not self._echo(said[0], forks):
                    return str(said[0])
                if word == "lasted":
                    self.lasted.append(said[0])
                if word == "exporting":
                    self.exports.add(said[0])
                if word == "saved":
                    saved[-1] = max(saved[-1], said[0])
                if word == "found" and said[0] < self.durable:
                    return f"rank {rank} resumed at step {said[0]}, though step {self.durable} was durable"
                if word in ("saving", "found") and self.digests.setdefault((rank, said[0]), said[1]) != said[1]:
                    return f"step {said[0]} of rank {rank} has other bits than it had before ({word})"
            if not any(word == "ready" for word, *_ in one.told):
                return f"rank {rank} never got to work"
        self.durable = max(saved)
        return ""

    def _echo(self, raised: str, forks: list[Fork]) -> bool:
        """Whether a rank raised only that another one, which was killed, is gone."""
        return len(forks) > 1 and any(word in raised for word in ("Connection", "RankError", "DistNetworkError"))

    def _left(self) -> str:
        """Return what is wrong with the files that are left."""
        if problem := wrong_with(RunFolder(self.path / "run"), self.durable):
            return problem
        if self.operation.slow:
            Staging.beside(self.path / "exported").recover()  # as the next export does
        if not (self.path / "exported").is_dir():
            return "the exported folder is gone"
        if self.exports and checksum(saved_weights(self.path / "exported")) not in self.exports:
            return "the exported folder is not one that was exported"
        for place in ("run", "exported"):
            if (self.path / place / "notes.txt").read_text() != _NOTES:
                return f"the user's notes in {place} have changed"
        return ""


def _live(tell: Callable[..., None], operation: Operation, path: Path, handler: bool) -> None:
    """Resume, and work until killed."""
    warnings.simplefilter("ignore")
    if handler:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run = TinyRun(operation.sizes)
    folder = RunFolder(path / "run", keep_last=2)
    if run.resume(folder):
        tell("found", run.step, run.digest())
    else:
        run.train()
        _save(run, folder, tell)
        run.runtime.export(path / "exported")
        tell("exporting", checksum(saved_weights(path / "exported")))
    if operation.slow:
        _slow_renames()
    tell("ready")
    while True:
        start = time.monotonic()
        operation.work(run, path, tell)
        tell("lasted", time.monotonic() - start)


def _slow_renames() -> None:
    """Let every rename take a while before and after, on a disk that cannot exchange two folders."""
    rename, atomic_dir._exchange = os.rename, lambda *folders: False

    def slowly(*arguments: Any, **options: Any) -> None:
        time.sleep(_SLOW)
        rename(*arguments, **options)
        time.sleep(_SLOW)

    os.rename = slowly  # type: ignore[assignment]


def _said(word: str) -> Callable[[Fork], bool]:
    return lambda one: any(said[0] == word for said in one.told)
