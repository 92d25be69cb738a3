"""Notice that the scheduler wants this job to end, and leave it the time to save."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading

import attrs

CODE = 75  # EX_TEMPFAIL of sysexits.h: the job failed for now, and should be run again


@attrs.define(eq=False)
class StopRequest:
    """The signals that this process got since it began to listen; ``name`` is that of the first, or None."""

    name: str | None = None
    grace_seconds: float = 0
    _known: set[int] = attrs.field(factory=set)
    _mask: set[int] = attrs.field(factory=set)  # the signals that this thread holds back by itself

    def listen(self, signals: tuple[int, ...], grace_seconds: float) -> None:
        """From now on, note *signals* in place of ending the process; end it *grace_seconds* after the first.

        Call it on the main thread; later calls add signals. Raises RuntimeError on another thread.
        """
        self.grace_seconds = grace_seconds
        new = sorted(set(signals) - self._known)
        if new and threading.current_thread() is not threading.main_thread():
            raise RuntimeError("signals can only be handled on the main thread; call save_if_preempted there")
        if new and not self._known:
            self._watch()
        for number in new:
            signal.signal(number, lambda got, _: self._note(got))
            self._known.add(number)

    def _note(self, number: int) -> None:
        self.name = self.name or signal.Signals(number).name

    def _watch(self) -> None:
        """Start the thread that ends the process in the end.

        Python's own handlers wait until the main thread leaves a collective, which may never be; the C handler writes
        the signal's number to the socket at once.
        """
        reading, writing = socket.socketpair()
        writing.setblocking(False)
        signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
        os.register_at_fork(before=self._hold, after_in_parent=self._release, after_in_child=self._let_go)
        threading.Thread(target=self._end_late, args=(reading, writing), name="nemo_dist grace", daemon=True).start()

    def _hold(self) -> None:
        """Hold signals back while a child starts, until it has handlers of its own: it shares the socket till then."""
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._known)

    def _release(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _let_go(self) -> None:
        """Let a child process, such as a worker of a DataLoader, end at a signal as it would have without this."""
        signal.set_wakeup_fd(-1)
        for number in self._known:
            signal.signal(number, signal.SIG_DFL)
        self._release()

    def _end_late(self, reading: socket.socket, writing: socket.socket) -> None:
        number = 0
        while number not in self._known:  # other signals that Python handles are written too
            number = reading.recv(1)[0]
        threading.Event().wait(self.grace_seconds)
        sys.stderr.write(
            f"nemo_dist: ended {self.grace_seconds:g} s after {signal.Signals(number).name}, before a save was done\n"
        )
        sys.stderr.flush()
        os._exit(CODE)  # a checkpoint that is not complete is no loss


stop_request = StopRequest()
