"""Folders of a test session, which go when its process ends, or, where that was killed, when the next one starts."""

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
    """Return a new folder that is called *name* and something; it is removed when this process ends."""
    return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=_root(os.getpid())))


@lru_cache(maxsize=1)
def _root(pid: int) -> Path:
    """Return the folder of this process, under its number: a child of a fork makes its own."""
    _sweep(Path(tempfile.gettempdir()))
    root = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{pid}_"))
    atexit.register(_remove, root, pid)
    return root


def _remove(root: Path, pid: int) -> None:
    if os.getpid() == pid:
        shutil.rmtree(root, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove what processes left that were killed: those of this user that do not exist any more."""
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
