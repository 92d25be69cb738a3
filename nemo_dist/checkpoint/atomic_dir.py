"""Write a folder from all ranks into a temporary folder next to it, and rename that when it is complete."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import attrs

from nemo_dist.checkpoint.folder_lock import locked
from nemo_dist.errors import CheckpointError
from nemo_dist.mesh.rank_group import RankGroup
from nemo_dist.planning.validation import shown


def folder_at(path: str | os.PathLike[str]) -> Path:
    """Return *path* absolute, without links and ``~``; raise CheckpointError for what cannot name a folder."""
    try:
        found = Path(path).expanduser().resolve()
        str(found).encode()  # a letter that no text has
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{shown(path)} is no path: {error}") from error
    if not found.name:
        raise CheckpointError(f"{found} is the root of all folders; name a folder in it")
    return found


@attrs.frozen
class Staging:
    """The temporary folder that is written (``partial``) and its target (``final``), on one shared file system."""

    partial: Path
    final: Path

    @classmethod
    def beside(cls, path: str | os.PathLike[str]) -> Staging:
        """Return the staging for *path*: a hidden folder in the same parent, so that a rename suffices to move it."""
        final = folder_at(path)
        return cls(final.with_name(f".{final.name}.partial"), final)

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Create an empty temporary folder, removing leftovers of an interrupted write; called on one rank.

        An error within the context removes it again, so that what failed for lack of room leaves the room to others.
        Raises CheckpointError when the target is a file, or the folder in which this process works: it would be left
        without one.
        """
        if self.final.exists() and not self.final.is_dir():
            raise CheckpointError(f"{self.final} is a file; name a folder")
        if self.final.exists() and _works_in(self.final):
            raise CheckpointError(
                f"{self.final} is replaced as a whole, but this process works in it; name another folder"
            )
        self.recover()
        for left in (self.partial, self._old):
            shutil.rmtree(left, ignore_errors=True)
        self.partial.mkdir(parents=True)
        try:
            yield
        except Exception:
            if self.final.exists() or not self._old.exists():  # else ``recover`` needs it
                shutil.rmtree(self.partial, ignore_errors=True)
            raise

    def recover(self) -> None:
        """Finish a commit that was interrupted between renaming the old folder away and the new one into place."""
        if not self.final.exists() and self._old.is_dir() and self.partial.is_dir():
            self._place()

    def commit(self, stale: Callable[[str], bool]) -> None:
        """Replace the target by the complete temporary folder, on one rank; old entries that are not *stale* stay.

        The files of the old folder are removed but not written to, so that they stay readable where they are
        memory-mapped.
        """
        sync_tree(self.partial)
        if self.final.exists():
            shutil.rmtree(self._old, ignore_errors=True)
            _keep(self.final, self.partial, stale)
            if _exchange(self.partial, self.final):
                sync(self.final.parent)
                shutil.rmtree(self.partial, ignore_errors=True)
                return
            self.final.rename(self._old)
        self._place()
        shutil.rmtree(self._old, ignore_errors=True)

    def _place(self) -> None:
        try:
            self.partial.rename(self.final)
        except FileNotFoundError:
            if not self.final.is_dir():  # else a process that loads it has done this
                raise
        sync(self.final.parent)

    @property
    def _old(self) -> Path:
        return self.final.with_name(f".{self.final.name}.old")

    @property
    def lock(self) -> Path:
        """The file that the process which writes the folder holds locked."""
        return self.final.with_name(f".{self.final.name}.lock")


# What a file system says that cannot do what was asked: exchange two folders, or make a hard link.
_NOT_THERE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EXDEV, errno.EMLINK)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of linux/fcntl.h and linux/fs.h


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step, so that both paths have a folder at any moment; return False where it cannot.

    Linux can, on most local disks; NFS cannot.
    """
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NOT_THERE:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def _keep(old: Path, new: Path, stale: Callable[[str], bool]) -> None:
    """Add the entries of *old* that are not *stale* to *new*: files as hard links, where there are such."""
    for entry in old.iterdir():
        if stale(entry.name) or (new / entry.name).exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=_link)
        else:
            _link(entry, new / entry.name)


def _link(old: str | os.PathLike[str], new: str | os.PathLike[str]) -> None:
    """Make *new* a hard link to the file or link *old*, or a copy: buckets and USB disks have no hard links."""
    try:
        os.link(old, new, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NOT_THERE:
            raise
        shutil.copy2(old, new, follow_symlinks=False)


def _works_in(folder: Path) -> bool:
    """Whether the working folder of this process, if it is there still, is *folder* or in it."""
    try:
        return Path.cwd().is_relative_to(folder)
    except FileNotFoundError:
        return False


def discard(path: Path) -> None:
    """Remove a folder, or a link to one, as far as that is possible."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """Flush *folder* and everything in it to the disk (fsync)."""
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink():
            sync(path)


def sync(path: Path) -> None:
    """Flush the content of a file, or the entries of a folder, to the disk (fsync)."""
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
    refuse: Callable[[Path], None] = lambda folder: None,
    prepare: Callable[[], None] = lambda: None,
    finish: Callable[[Path, list[Any]], None] = lambda folder, answers: None,
    committed: Callable[[], None] = lambda: None,
) -> None:
    """Have every rank *write* into a temporary folder, then move it to *path*; collective over *ranks*.

    *what* names the folder in errors. *write* returns a small JSON value. The first rank calls *prepare* before and,
    afterwards, *finish* with the temporary folder and the values of all ranks in rank order, moves the folder to
    *path*, and calls *committed*. *stale* says by name which entries of an existing folder are dropped; the others
    stay. *refuse* gets an existing folder before anything is written, and raises CheckpointError when it must not be
    replaced; so does the system when another process is writing there. Raises CheckpointError where the disk fails,
    and RankError on the other ranks; an error before the move leaves the folder at *path* unchanged, and nothing else.
    """
    staging = Staging.beside(path)

    def begin() -> None:
        prepare()
        held.enter_context(locked(staging.lock, staging.final))
        if staging.final.is_dir():
            refuse(staging.final)
        held.enter_context(staging.begun())

    def written() -> Any:
        if not staging.partial.is_dir():
            raise CheckpointError(f"this rank does not see {staging.partial}; all ranks must share the file system")
        return write(staging.partial)

    with ExitStack() as held:
        with ranks.agreed(f"preparing {what} at {staging.final}"):
            if ranks.first:
                begin()
        answers: list[Any] = []  # on the first rank
        ranks.decide(f"writing {what} to {staging.final}", written, answers.extend)
        with ranks.agreed(f"putting {what} in place at {staging.final}"):
            if ranks.first:
                finish(staging.partial, answers)
                staging.commit(stale)
                committed()
