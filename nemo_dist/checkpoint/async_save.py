"""Run one save at a time in a background thread, and make sure that its error is raised."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import traceback
from collections.abc import Callable

from nemo_dist.errors import CheckpointError

_current: Save | None = None
_saving = threading.Lock()


class Save:
    """A save that was started; ``wait`` for it before you use its files, or let the next save or load do so."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="nemo_dist save")

    def done(self) -> bool:
        """Whether the save has ended, with or without an error."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Wait until the checkpoint is complete; raise the error of the save, once."""
        self._thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._error = error
        del self._work  # and with it the copy of the state in host memory
        _saving.release()


def begin(work: Callable[[], None]) -> Save:
    """Run *work* in a thread; the caller must have waited for the previous save.

    Raises CheckpointError where another thread, or what a signal has interrupted, has begun one meanwhile.
    """
    global _current
    if not _saving.acquire(blocking=False):
        raise CheckpointError("another thread of this process saves just now; save from one thread at a time")
    save = Save(work)
    try:
        save._thread.start()
    except BaseException:
        _saving.release()
        raise
    if _current is None:
        atexit.register(_at_exit)
    _current = save
    return save


def finish() -> None:
    """Wait for the current save, if there is one, and raise its error."""
    if _current is not None:
        _current.wait()


def _at_exit() -> None:
    """At process exit, report an error that no one waited for, and exit with code 1."""
    try:
        finish()
    except BaseException:
        print("nemo_dist: an asynchronous save failed, and the process ended without waiting for it", file=sys.stderr)  # noqa: T201
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # an exception in an exit handler leaves the exit code at 0
