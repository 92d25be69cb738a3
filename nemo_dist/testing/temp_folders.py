"""Temporary folders of tests, removed when their process ends or, if that was killed, when the next one starts."""

from __future__ import annotations

import atexit
import os
import re
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

_PREFIX = "nemo_dist_test_"
_OWNED = re.compile(_PREFIX + r"([0-9]+)_.*")


def scratch(name: str) -> Path:
    """Return a new folder whose name starts with *name*; it is removed when this process ends."""
    return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=_root(os.getpid())))


@lru_cache(maxsize=1)
def _root(pid: int) -> Path:
    """Return the root folder of process *pid*; a forked child gets its own."""
    _sweep(Path(tempfile.gettempdir()))
    root = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{pid}_"))
    atexit.register(_remove, root, pid)
    return root


def _remove(root: Path, pid: int) -> None:
    if os.getpid() == pid:
        shutil.rmtree(root, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove the folders of processes that do not exist any more."""
    for entry in folder.glob(f"{_PREFIX}*"):
        owner = _OWNED.fullmatch(entry.name)
        if owner and not _exists(int(owner[1])):
            shutil.rmtree(entry, ignore_errors=True)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # another user's
    return True
