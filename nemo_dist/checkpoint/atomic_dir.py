"""Write a folder with all ranks beside its place; it appears there only when it is complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs

from nemo_dist.errors import CheckpointError
from nemo_dist.mesh.rank_group import RankGroup


@attrs.frozen
class Staging:
    """Where a folder is written, and where it belongs: both on one file system that all ranks share."""

    partial: Path
    final: Path

    @classmethod
    def beside(cls, path: str | os.PathLike[str]) -> Staging:
        """Return the staging for *path*: a hidden neighbour, so that the rename stays on one file system."""
        final = Path(path).expanduser().resolve()
        return cls(final.with_name(f".{final.name}.partial"), final)

    def begin(self) -> None:
        """Make the folder anew; what an interrupted run left in it is gone. On one rank."""
        if self.final.exists() and not self.final.is_dir():
            raise CheckpointError(f"{self.final} is a file; name a folder")
        self.recover()
        for left in (self.partial, self._old):
            shutil.rmtree(left, ignore_errors=True)
        self.partial.mkdir(parents=True)

    def recover(self) -> None:
        """Finish a commit that was cut short between taking the old folder away and putting the new one in place."""
        if not self.final.exists() and self._old.is_dir() and self.partial.is_dir():
            self._place()

    def commit(self, stale: Callable[[str], bool]) -> None:
        """Put the complete folder in its place, on one rank; entries there that are not *stale* are kept.

        Files of the folder before stay readable where they are mapped, as their content is not touched.
        """
        sync_tree(self.partial)
        if self.final.exists():
            shutil.rmtree(self._old, ignore_errors=True)
            _keep(self.final, self.partial, stale)
            self.final.rename(self._old)
        self._place()
        shutil.rmtree(self._old, ignore_errors=True)

    def _place(self) -> None:
        self.partial.rename(self.final)
        sync(self.final.parent)

    @property
    def _old(self) -> Path:
        return self.final.with_name(f".{self.final.name}.old")


def _keep(old: Path, new: Path, stale: Callable[[str], bool]) -> None:
    """Bring what is not *stale* along: files by a second name for the same content, folders as copies."""
    for entry in old.iterdir():
        if stale(entry.name) or (new / entry.name).exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=os.link)
        else:
            os.link(entry, new / entry.name, follow_symlinks=False)


def sync_tree(folder: Path) -> None:
    """Make *folder* durable with everything in it."""
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink():
            sync(path)


def sync(path: Path) -> None:
    """Make the content of a file, or the entries of a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_folder(
    ranks: RankGroup,
    path: str | os.PathLike[str],
    what: str,
    *,
    write: Callable[[Path], Any],
    stale: Callable[[str], bool],
    finish: Callable[[Path, list[Any]], None] = lambda folder, answers: None,
    committed: Callable[[], None] = lambda: None,
) -> None:
    """Have every rank *write* into a folder beside *path*, then put it in place; collective over *ranks*.

    *what* names the folder in errors. *write* returns a small JSON value. The first rank then *finishes* the folder,
    with what every rank returned, puts it at *path*, and calls *committed*. *stale* says which entries of a folder that
    is there already go with it. Raises CheckpointError where the disk fails, and RankError on the other ranks; what was
    at *path* is then still there.
    """
    staging = Staging.beside(path)
    with ranks.agreed(f"preparing {what} at {staging.final}"):
        if ranks.first:
            staging.begin()

    def written() -> Any:
        if not staging.partial.is_dir():
            raise CheckpointError(f"this rank does not see {staging.partial}; all ranks must share the file system")
        return write(staging.partial)

    answers = ranks.collect(f"writing {what} to {staging.final}", written)
    with ranks.agreed(f"putting {what} in place at {staging.final}"):
        if ranks.first:
            finish(staging.partial, answers)
            staging.commit(stale)
            committed()
