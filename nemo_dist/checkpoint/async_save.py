"""A save under way: at most one per process, whose error is never lost."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import traceback
from collections.abc import Callable

_current: Save | None = None


class Save:
    """A save that was begun; ``wait`` for it before its files are used, or let the next save or load do it."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="nemo_dist save")

    def done(self) -> bool:
        """Whether the save has ended, well or not."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Return when the checkpoint is in place; raise what went wrong, once."""
        self._thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._error = error


def begin(work: Callable[[], None]) -> Save:
    """Run *work* in a thread; the one before must have been waited for."""
    global _current
    if _current is None:
        atexit.register(_at_exit)
    _current = Save(work)
    _current._thread.start()
    return _current


def finish() -> None:
    """Wait for the save under way, if there is one, and raise its error."""
    if _current is not None:
        _current.wait()


def _at_exit() -> None:
    """Say that the last save failed, and make the process fail with it, if nobody has heard of it."""
    try:
        finish()
    except BaseException:
        print("nemo_dist: an asynchronous save failed, and the process ended without waiting for it", file=sys.stderr)  # noqa: T201
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # an exception in an exit handler leaves the exit code at 0
