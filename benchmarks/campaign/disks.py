"""Save and export to disks that are full, fail at the n-th call, or become read-only; then the disk is well again."""

from __future__ import annotations

import builtins
import errno
import io
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import attrs
import torch

from campaign.forks import call
from campaign.remains import wrong_with
from campaign.tally import Tally
from campaign.tiny_run import TinyRun, checksum
from nemo_dist import CheckpointError, RankError, RunFolder
from nemo_dist.testing.tensors import saved_weights

_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.ESTALE)
_CALLS = ("mkdir", "rename", "open", "fsync", "link", "unlink", "rmdir")
_ROOM = "size=6m"


def run(count: int, chance: Random, folder: Path) -> Iterator[Tally]:
    """Yield the counts of each kind of fault."""
    for name, fault in FAULTS.items():
        for what in OPERATIONS:
            place = folder / f"{name}-{what}".replace(" ", "-")
            share = max(1, count // 10) if fault is read_only else count
            yield call(1, on_rank_try, f"{name}: {what}", fault, what, share, chance, place)[0]


def save(run: TinyRun, folder: Path) -> None:
    """Save in the foreground."""
    run.save(RunFolder(folder / "run", keep_last=2))


def save_in_the_background(run: TinyRun, folder: Path) -> None:
    """Save in the background, and wait for it."""
    run.save(RunFolder(folder / "run", keep_last=2), asynchronous=True).wait()


def export(run: TinyRun, folder: Path) -> None:
    """Export over the last export."""
    run.runtime.export(folder / "exported")


OPERATIONS = {"save": save, "asynchronous save": save_in_the_background, "export": export}


def on_rank_try(
    tell: Callable[..., None],
    name: str,
    fault: Callable[[Path, Random, int], Any],
    what: str,
    count: int,
    chance: Random,
    folder: Path,
) -> Tally:
    """Try *what* in *folder* under *fault*; after each time the disk is well again, and all must be as before."""
    tally, run, folder = Tally(name), TinyRun(), folder.resolve()
    with small_disk(folder):
        saved: dict[int, int] = {}
        for _ in range(2):
            run.train()
            saved[run.step] = run.digest()
            save(run, folder)
            export(run, folder)
        exported = checksum(saved_weights(folder / "exported"))
        room = _used(folder)
        for _ in range(count):
            run.train()
            memory, durable, problem = run.digest(), max(saved), ""
            with fault(folder, chance, room):
                try:
                    OPERATIONS[what](run, folder)
                    refused = ""
                except (CheckpointError, RankError) as error:
                    refused = str(error)
                except BaseException as error:
                    refused, problem = "raw", f"{type(error).__name__}: {error}"
            if not refused:
                durable = run.step if "save" in what else durable
            if run.digest() != memory:
                problem = "the run in memory has changed"
            saved[run.step] = memory
            found = checksum(saved_weights(folder / "exported"))
            if found not in (exported, checksum(run.weights())):
                problem = problem or "the exported folder is neither the old one nor the new one"
            exported = found
            problem = problem or wrong_with(RunFolder(folder / "run"), durable)
            resumed = _resumed(folder)
            saved = {step: digest for step, digest in saved.items() if step <= resumed[0]}
            if saved[resumed[0]] != resumed[1]:
                problem = problem or f"step {resumed[0]} came back with other bits"
            if problem:
                tally.lose(f"{problem} (after {refused or 'no error'})")
            else:
                tally.refuse() if refused else tally.survive()
    return tally


def _resumed(folder: Path) -> tuple[int, int]:
    """Return the step that a new run finds, and its digest."""
    generator = torch.get_rng_state()
    other = TinyRun()
    other.resume(RunFolder(folder / "run"))
    found = other.step, other.digest()
    torch.set_rng_state(generator)
    return found


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Mount a small disk at *folder*, where this user may; else it is a plain folder."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", _ROOM, "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def _used(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@contextmanager
def full(folder: Path, chance: Random, room: int) -> Iterator[None]:
    """Leave anything from no room to enough."""
    if not os.path.ismount(folder):
        raise RuntimeError("a full disk needs a user that may mount one")
    filler, free = folder / "filler", chance.randrange(room * 2 // 3)
    stats = os.statvfs(folder)
    with filler.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, max(1, stats.f_bavail * stats.f_bsize - free))
    try:
        yield
    finally:
        filler.unlink()


@contextmanager
def read_only(folder: Path, chance: Random, room: int) -> Iterator[None]:
    """Mount the disk once more over itself, read-only."""
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def failing_call(folder: Path, chance: Random, room: int) -> Iterator[None]:
    """Let one of the calls that change the disk fail, or that and all after it."""
    disk = _FailingDisk(at=chance.randrange(1, 60), error=chance.choice(_ERRORS), lasting=chance.random() < 0.5)
    with disk.in_place():
        yield


FAULTS = {"disk full": full, "failing disk call": failing_call, "read-only disk": read_only}


@attrs.define
class _FailingDisk:
    """Raises OSError from call number *at* that changes a disk, and with *lasting* from all later ones."""

    at: int
    error: int
    lasting: bool
    count: int = 0

    def tick(self) -> None:
        """Count a call, and raise when it is one that fails."""
        self.count += 1
        if self.count == self.at or (self.lasting and self.count > self.at):
            raise OSError(self.error, os.strerror(self.error))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Replace the calls of ``os`` and ``open``."""
        kept = {name: getattr(os, name) for name in _CALLS}, io.open, builtins.open
        for name, function in kept[0].items():
            setattr(os, name, self._counting(function))
        io.open = builtins.open = self._open(kept[1])  # type: ignore[assignment]
        try:
            yield
        finally:
            for name, function in kept[0].items():
                setattr(os, name, function)
            io.open, builtins.open = kept[1:]

    def _counting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.tick()
            return function(*arguments, **options)

        return counted

    def _open(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def opened(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if not set(mode) & set("wax+"):
                return function(file, mode, *arguments, **options)
            self.tick()
            return _File(function(file, mode, *arguments, **options), self.tick)

        return opened


class _File:
    """A file whose first write, flush and close may fail."""

    def __init__(self, file: Any, tick: Callable[[], None]) -> None:
        self._file, self._tick, self._written = file, tick, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def write(self, content: Any) -> Any:
        """Write *content*."""
        if not self._written:
            self._written = True
            self._tick()
        return self._file.write(content)

    def flush(self) -> None:
        """Flush the file."""
        self._tick()
        self._file.flush()

    def close(self) -> None:
        """Close the file, also when that fails."""
        if not self._file.closed:
            self._file.close()
            self._tick()
