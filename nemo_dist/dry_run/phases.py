"""Measure the CPU time of the parts of a program, and the most memory that the process held meanwhile."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import attrs

_RESET_PEAK = "5"  # see proc_pid_clear_refs(5)


@attrs.frozen
class Phase:
    """A part of a program: CPU seconds of the process, and its peak of resident memory in bytes."""

    name: str
    cpu_s: float
    peak_rss_bytes: int


@attrs.define
class Phases:
    """The parts of a program in the order in which they ran."""

    done: list[Phase] = attrs.field(factory=list)

    @contextmanager
    def measured(self, name: str) -> Iterator[None]:
        """Measure the with-block as the part *name*."""
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
        start = time.process_time()
        yield
        self.done.append(Phase(name, time.process_time() - start, peak_rss()))

    def cpu(self, name: str) -> float:
        """Return the CPU seconds of the part *name*."""
        return next(phase.cpu_s for phase in self.done if phase.name == name)


def peak_rss() -> int:
    """Return the most resident memory of this process in bytes: of the part that is measured, where the system can."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
