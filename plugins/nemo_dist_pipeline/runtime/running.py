"""Refuse a run of a pipeline inside of another, as by a loss: only the last stage would call it, and wait for ever."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_running: list[object] = []


@contextmanager
def running(pipeline: object) -> Iterator[None]:
    """Within the context *pipeline* runs; raise ValueError where one does already."""
    if _running:
        raise ValueError(
            "a loss, or a hook, calls a pipeline while one runs, and its other stages do not; call what the loss needs "
            "before the step, as runtime.forward(batch), and put the outputs into the batch, which the loss reads"
        )
    _running.append(pipeline)
    try:
        yield
    finally:
        _running.clear()
