"""Notice that the scheduler wants this job to end, and leave it the time to save."""

from __future__ import annotations

import os
import signal
import sys
import threading

import attrs

CODE = 75  # EX_TEMPFAIL of sysexits.h: the job failed for now, and should be run again


@attrs.define(eq=False)
class StopRequest:
    """The signals that this process got since it began to listen; ``name`` is that of the first, or None."""

    name: str | None = None
    _known: set[int] = attrs.field(factory=set)

    def listen(self, signals: tuple[int, ...], grace_seconds: float) -> None:
        """From now on, note *signals* in place of ending the process; end it *grace_seconds* after the first.

        Call it on the main thread; later calls add signals. Raises RuntimeError on another thread.
        """
        for number in sorted(set(signals) - self._known):
            if threading.current_thread() is not threading.main_thread():
                raise RuntimeError("signals can only be handled on the main thread; call save_if_preempted there")
            signal.signal(number, lambda got, _: self._note(got, grace_seconds))
            self._known.add(number)

    def _note(self, number: int, grace_seconds: float) -> None:
        if self.name is not None:  # srun and its daemons may both pass the same signal on
            return
        self.name = signal.Signals(number).name
        limit = threading.Timer(grace_seconds, _end_now, [self.name, grace_seconds])
        limit.daemon = True
        limit.start()


def _end_now(name: str, grace_seconds: float) -> None:
    """End the process where a save, or a step before it, does not end; a checkpoint that is not complete is no loss."""
    sys.stderr.write(f"nemo_dist: ended {grace_seconds:g} s after {name}, without a save of the newest step\n")
    sys.stderr.flush()
    os._exit(CODE)


stop_request = StopRequest()
