"""A folder that is written beside its place by all ranks, and appears there only when it is complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
import torch.distributed as dist

from nemo_dist.errors import CheckpointError
from nemo_dist.meeting import report


def rank() -> int:
    """Return this rank, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


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
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)

    def commit(self, stale: Callable[[str], bool]) -> None:
        """Put the complete folder in its place, on one rank; entries there that are not *stale* are kept.

        Files of the folder before stay readable where they are mapped, as their content is not touched.
        """
        sync_folder(self.partial)
        if not self.final.exists():
            self.partial.rename(self.final)
        else:
            old = self.final.with_name(f".{self.final.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            self.final.rename(old)
            self.partial.rename(self.final)
            for entry in old.iterdir():
                if not stale(entry.name) and not (self.final / entry.name).exists():
                    entry.rename(self.final / entry.name)
            shutil.rmtree(old, ignore_errors=True)
        sync_folder(self.final.parent)


def sync_folder(folder: Path) -> None:
    """Make the entries of *folder* durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def agreed(occasion: str) -> Iterator[None]:
    """Run the context on every rank; what it raises on one is raised on all, after all came to its end."""
    failure: BaseException | None = None
    try:
        yield
    except Exception as error:
        failure = error
        if isinstance(error, OSError):
            failure = CheckpointError(f"{occasion} failed: {error}")
            failure.__cause__ = error
    report(occasion, failure)


@contextmanager
def written_beside(path: str | os.PathLike[str], what: str, stale: Callable[[str], bool]) -> Iterator[Path]:
    """Give all ranks the folder to write *what* into; at the end it is put at *path*. Collective over all ranks.

    *stale* says which entries of a folder that is there already go with it. Raises CheckpointError where the disk
    fails, and RankError on the other ranks; what was at *path* is then still there.
    """
    staging = Staging.beside(path)
    with agreed(f"preparing {what} at {staging.final}"):
        if rank() == 0:
            staging.begin()
    with agreed(f"writing {what} to {staging.final}"):
        if not staging.partial.is_dir():
            raise CheckpointError(f"rank {rank()} does not see {staging.partial}; all ranks must share the file system")
        yield staging.partial
    with agreed(f"putting {what} in place at {staging.final}"):
        if rank() == 0:
            staging.commit(stale)
