"""Find out that a rank which others wait for at a meeting will not come, because it trains on or waits at another one.

Without this a rank that saves alone, while the others train on, would wait for half an hour, and they for it. A step or
a meeting that is only slow is never taken for one that will not end: steps are counted, and a rank in a later step than
another, or in another meeting of the same ranks that has no result, cannot come.
"""

from __future__ import annotations

import json
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import attrs
import torch.distributed as dist

from nemo_dist.mesh.meeting import count, read

_LONG = 6.0  # seconds after which a step is told to other ranks
_progress: dict[tuple[int, ...], Progress] = {}  # by the ranks that train together


@attrs.define(eq=False)
class Progress:
    """How far this process is in training together with *members*: in which step, of which runtime on these ranks."""

    members: tuple[int, ...]
    runtimes: int = 0
    steps: int = 0
    since: float | None = None
    told: int = 0

    @classmethod
    def of(cls, members: Sequence[int]) -> Progress:
        """Return the progress of this process in what *members* do together."""
        return _progress.setdefault(tuple(members), cls(tuple(members)))

    @classmethod
    def of_new_runtime(cls, ranks: Sequence[int] | None, store: dist.Store | None) -> Progress:
        """Return the progress of a new runtime on *ranks* (None: all), from step 0; None as *store* tells nobody."""
        world = dist.get_world_size() if dist.is_initialized() else 1
        own = cls.of(range(world) if ranks is None else ranks)
        own.runtimes, own.steps, own.told = own.runtimes + 1, 0, 0
        if store is not None and len(own.members) > 1:
            _tell_of_long_steps(store)
        return own

    @contextmanager
    def step(self) -> Iterator[None]:
        """Count a step; other ranks get to know of one that takes long."""
        self.steps, self.since = self.steps + 1, time.monotonic()
        try:
            yield
        finally:
            self.since = None


def elsewhere(store: dist.Store, rank: int, members: Sequence[int], occasion: str, prefix: str) -> str:
    """Return in words where *rank* is, if it cannot come to the meeting of *members* at *prefix*; else ""."""
    own = Progress.of(members)
    here = f"rank {dist.get_rank()} waits at {occasion!r} after step {own.steps}"
    step = _key("step", members, rank)
    if store.check([step]):
        runtimes, steps = json.loads(store.get(step))
        if (runtimes, steps) > (own.runtimes, own.steps):
            return (
                f"rank {rank} trains on, in step {steps}, and {here}: a call in which ranks meet, such as save, is one "
                "for all ranks, after the same step"
            )
    waits = waiting(store, rank, members)
    if waits is not None and waits[1] != prefix:
        return f"rank {rank} waits at {waits[0]!r}, and {here}: all ranks must make the same calls in order"
    return ""


def arrive(store: dist.Store, rank: int, members: Sequence[int], occasion: str, prefix: str) -> None:
    """Say that *rank* waits at the meeting of *members* at *prefix*."""
    store.set(_key("at", members, rank), json.dumps([occasion, prefix, Progress.of(members).steps]))


def go_on(store: dist.Store, rank: int, members: Sequence[int]) -> None:
    """Take back that *rank* waits."""
    store.delete_key(_key("at", members, rank))


def waiting(store: dist.Store, rank: int, members: Sequence[int]) -> tuple[str, str, int] | None:
    """Return at which occasion and prefix, and after how many steps, *rank* waits for *members*; None if it does not.

    A rank that will go on at once, as all have come to its meeting, does not wait.
    """
    told = read(store, _key("at", members, rank))
    if told is None:
        return None
    occasion, prefix, steps = json.loads(told)
    return (occasion, prefix, steps) if 0 < count(store, f"{prefix}/came") < len(members) else None


def meetings(store: dist.Store, rank: int) -> list[str]:
    """Return in words at which meetings of ranks that this process trains with *rank* waits now."""
    found = [waiting(store, rank, members) for members in _progress]
    return [f"{occasion!r} after {steps} steps" for occasion, _, steps in filter(None, found)]


def _key(what: str, members: Sequence[int], rank: int) -> str:
    return f"nemo_dist/{what}/{zlib.crc32(repr(tuple(members)).encode())}/{rank}"


_telling: threading.Thread | None = None


def _tell_of_long_steps(store: dist.Store) -> None:
    """Start the thread that does so; it has a connection of its own to *store*, as one that waits blocks others."""
    global _telling
    if _telling is None or not _telling.is_alive():
        _telling = threading.Thread(target=_tell, args=(store.clone(), dist.get_rank()), daemon=True)  # type: ignore[attr-defined]
        _telling.start()


def _tell(store: dist.Store, rank: int) -> None:
    with suppress(RuntimeError):  # the process that has the store is gone
        while True:
            time.sleep(_LONG / 4)
            for own in list(_progress.values()):
                since, steps = own.since, own.steps
                if since is not None and own.told != steps and time.monotonic() - since > _LONG:
                    store.set(_key("step", own.members, rank), json.dumps([own.runtimes, steps]))
                    own.told = steps
