"""Load, resume and export from disks that fail when read: an error at the n-th call, or a file that is gone by then."""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import attrs
import torch.distributed as dist

from campaign.forks import call
from campaign.tally import Tally
from campaign.tiny_run import TinyRun, checksum
from nemo_dist import CheckpointError, RankError, RunFolder, export_checkpoint
from nemo_dist.checkpoint import manifest

_ERRORS = (errno.EIO, errno.EACCES, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE)
_CALLS = ("stat", "scandir", "listdir", "open")
_MOST = 40  # calls before the one that fails


def run(count: int, chance: Random, folder: Path) -> Iterator[Tally]:
    """Yield the counts of each kind of fault, on one rank and on two, of which one has the bad disk."""
    for world in (1, 2):
        for fault in (failing, vanishing, replacing):
            for name, use in USES.items():
                if use is export and world > 1:
                    continue
                title = f"{fault.__name__}: {name}, {world} rank{'s' * (world > 1)}"
                place = folder / title.replace(" ", "-").replace(":", "").replace(",", "")
                tallies = call(world, on_rank_read, title, fault, use, max(1, count // world), chance, place)
                yield max(tallies, key=lambda tally: len(tally.lost))


def load(run: TinyRun, folder: Path) -> None:
    """Load the newest checkpoint."""
    run.runtime.load(folder / "run" / "step-00000002", run.optimizer, **run.also)


def resume(run: TinyRun, folder: Path) -> None:
    """Resume from the newest checkpoint that can be read."""
    RunFolder(folder / "run").resume(run.runtime, run.optimizer, **run.also)


def export(run: TinyRun, folder: Path) -> None:
    """Export the newest checkpoint that can be read, without the ranks that wrote it."""
    shutil.rmtree(folder / "exported", ignore_errors=True)
    export_checkpoint(folder / "run", folder / "exported")


USES = {"load": load, "resume": resume, "nemo-dist export": export}


def on_rank_read(
    tell: Callable[..., None],
    name: str,
    fault: Callable[[Path, Random], Any],
    use: Callable[[TinyRun, Path], None],
    count: int,
    chance: Random,
    folder: Path,
) -> Tally:
    """Try *use* under *fault* on one rank; what is refused must have changed nothing, and must name a file there."""
    warnings.simplefilter("ignore")
    tally, run = Tally(name), TinyRun()
    states = []
    for _ in range(2):
        run.train()
        run.save(RunFolder(folder / "run"))
        states.append(checksum(run.weights()))
    kept = folder / "kept"
    if dist.get_rank() == 0:
        shutil.copytree(folder / "run", kept)
    for _ in range(count):
        run.train()
        before, victim = checksum(run.tensors()), chance.randrange(dist.get_world_size())
        dist.barrier()
        with fault(folder / "run", chance) if dist.get_rank() == victim else _well(fault, chance):
            try:
                use(run, folder)
                said, problem = "", ""
            except (CheckpointError, RankError) as error:
                said, problem = str(error), ""
            except BaseException as error:
                said, problem = "raw", f"{type(error).__name__}: {error}"
        if said and not problem and checksum(run.tensors()) != before:
            problem = f"refused, but the run has changed: {said}"
        if said and not problem and str(folder) not in said:
            problem = f"no file is named: {said}"
        if not said and use is not export and checksum(run.weights()) not in states:
            problem = "the run has weights that were never saved"
        if problem:
            tally.lose(problem)
        else:
            tally.refuse() if said else tally.survive()
        dist.barrier()
        if dist.get_rank() == 0:  # the files only, as the run holds the lock of the folder
            _put_back(kept, folder / "run")
        dist.barrier()
    return tally


def _put_back(kept: Path, folder: Path) -> None:
    for path in sorted(kept.rglob("*")):
        there = folder / path.relative_to(kept)
        if there.is_dir() and not path.is_dir():
            shutil.rmtree(there)
        if there.is_file() and path.is_dir():
            there.unlink()
        if path.is_dir():
            there.mkdir(exist_ok=True)
        elif not there.is_file() or there.read_bytes() != path.read_bytes():
            shutil.copy2(path, there)


@contextmanager
def _well(fault: Callable[..., Any], chance: Random) -> Iterator[None]:
    """Draw as the rank with the fault does, so that ranks go on to draw alike."""
    with fault(Path("/nowhere"), chance):
        yield


@contextmanager
def failing(folder: Path, chance: Random) -> Iterator[None]:
    """Let a call that reads below *folder* fail, or that and all after it."""
    number, lasting = chance.choice(_ERRORS), chance.random() < 0.5

    def fail(path: Path) -> None:
        raise OSError(number, os.strerror(number))

    with _BadDisk(folder=folder, at=chance.randrange(1, _MOST), lasting=lasting, then=fail).in_place():
        yield


@contextmanager
def vanishing(folder: Path, chance: Random) -> Iterator[None]:
    """Let a file or folder be gone at the moment in which it is read."""
    with _BadDisk(folder=folder, at=chance.randrange(1, _MOST), lasting=False, then=_remove).in_place():
        yield


@contextmanager
def replacing(folder: Path, chance: Random) -> Iterator[None]:
    """Let a file be a folder, or a folder a file, at the moment in which it is read."""
    with _BadDisk(folder=folder, at=chance.randrange(1, _MOST), lasting=False, then=_replace).in_place():
        yield


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _replace(path: Path) -> None:
    folder = path.is_dir()
    _remove(path)
    if folder:
        path.write_text("a file")
    else:
        path.mkdir(parents=True, exist_ok=True)


@attrs.define(kw_only=True)
class _BadDisk:
    """Calls *then* with the path at call number *at* that reads below *folder*; with *lasting*, at all later ones."""

    folder: Path
    at: int
    lasting: bool
    then: Callable[[Path], None]
    count: int = 0
    busy: bool = False

    def tick(self, path: Any) -> None:
        """Count a call on *path*, and do what happens there when its turn has come."""
        if self.busy or not isinstance(path, str | os.PathLike) or not Path(path).is_relative_to(self.folder):
            return
        if Path(path) == self.folder or Path(path).name.startswith("."):
            return  # the locks of the run, and the folder itself, which the campaign needs
        self.count += 1
        if self.count == self.at or (self.lasting and self.count > self.at):
            self.busy = True
            try:
                self.then(Path(path))
            finally:
                self.busy = False

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Replace the calls of ``os`` and ``open``, and the one of safetensors."""
        kept = {name: getattr(os, name) for name in _CALLS}, io.open, builtins.open, manifest.safe_open
        for name, function in kept[0].items():
            setattr(os, name, self._counting(function))
        manifest.safe_open = self._counting(kept[3])
        io.open = builtins.open = self._open(kept[1])  # type: ignore[assignment]
        try:
            yield
        finally:
            for name, function in kept[0].items():
                setattr(os, name, function)
            io.open, builtins.open, manifest.safe_open = kept[1:]

    def _counting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(path: Any = ".", *arguments: Any, **options: Any) -> Any:
            self.tick(path)
            return function(path, *arguments, **options)

        return counted

    def _open(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def opened(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            self.tick(file)
            made = function(file, mode, *arguments, **options)
            return made if set(mode) & set("wax+") else _File(made, lambda: self.tick(file))

        return opened


class _File:
    """A file whose reads may fail."""

    def __init__(self, file: Any, tick: Callable[[], None]) -> None:
        self._file, self._tick = file, tick

    def __getattr__(self, name: str) -> Any:
        if name in ("read", "readinto", "readline", "readlines"):
            self._tick()
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._file.close()

    def __iter__(self) -> Any:
        self._tick()
        return iter(self._file)
