"""Keep two processes from writing to one folder at the same time."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nemo_dist.errors import CheckpointError

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # of file systems that cannot lock
_writing: dict[Path, object] = {}  # the locks that a thread of this process holds
_held: dict[Path, int] = {}  # the open files of the locks that this process keeps until it ends

for _locks in (_writing, _held):
    os.register_at_fork(after_in_child=_locks.clear)  # a lock is not inherited, nor a thread


@contextmanager
def locked(lock: Path, folder: Path) -> Iterator[None]:
    """Hold the file *lock* within the context, and remove it then; it stands for the right to write *folder*.

    Raises CheckpointError when another process holds it, or another thread of this one. The lock is one of POSIX: the
    system frees it when the process ends, however it ends, and children do not inherit it. On a file system without
    locks only the threads of this process are told.
    """
    mine = object()
    if _writing.setdefault(lock, mine) is not mine:
        raise CheckpointError(f"another thread of this process writes to {folder}; let one thread write at a time")
    try:
        handle = _acquired(lock, folder)
        try:
            yield
        finally:
            with suppress(OSError):  # a file that is left does no harm
                lock.unlink()
            os.close(handle)
    finally:
        del _writing[lock]


def claim(lock: Path, folder: Path) -> None:
    """Hold the file *lock* until this process ends; as ``locked`` otherwise, and once held it is held again."""
    handle = _held.get(lock)
    if handle is not None and _is_of(handle, lock):
        return
    if handle is not None:  # the folder was removed, and made anew
        os.close(_held.pop(lock))
    _held[lock] = _acquired(lock, folder)


def _acquired(lock: Path, folder: Path) -> int:
    """Return the open file *lock* once this process holds it."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _hold(handle, folder)
            if _is_of(handle, lock):  # else the process that held it before has removed the file
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _hold(handle: int, folder: Path) -> None:
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            holder = os.pread(handle, 200, 0).decode(errors="replace") or "a process that has just begun"
            raise CheckpointError(
                f"another run writes to {folder}: {holder}; give each run a folder of its own, or end the other one"
            ) from None
        if error.errno not in _NO_LOCKS:
            raise


def _is_of(handle: int, lock: Path) -> bool:
    """Whether *handle* is the open file *lock*."""
    try:
        return os.path.samestat(os.fstat(handle), lock.stat())
    except FileNotFoundError:
        return False
