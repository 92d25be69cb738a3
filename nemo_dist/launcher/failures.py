"""Describe how a process ended."""

from __future__ import annotations

import signal


def describe_exit(code: int) -> str:
    """Describe how a process ended; a negative *code* is the number of the signal that killed it."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
