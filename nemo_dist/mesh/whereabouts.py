"""While a rank waits for others at a meeting, find out which of them will not come, and where they are instead.

Without this a rank that saves alone, while the others train on, would wait for half an hour, and they for it. A rank
that waits says so in the store after some seconds, and so does one whose step takes that long; one that waits looks
there. A step or a meeting that is only slow is never taken for one that will not end: steps are counted, and a rank in
a later step than another, or in another meeting that has no result, cannot come.
"""

from __future__ import annotations

import json
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import attrs
import torch.distributed as dist

_LOOK = 3.0  # seconds between two looks at where the others are
_places: dict[tuple[int, ...], Place] = {}  # by the ranks that train together


@attrs.define(eq=False)
class Place:
    """How far this process is in training together with *members*: in which step, of which runtime on these ranks."""

    members: tuple[int, ...]
    runtimes: int = 0
    steps: int = 0
    since: float | None = None
    told: int = 0

    @classmethod
    def of(cls, members: Sequence[int]) -> Place:
        """Return the place of this process in what *members* do together."""
        return _places.setdefault(tuple(members), cls(tuple(members)))

    def new_runtime(self) -> Place:
        """Count steps from the start again, for another runtime; return this place."""
        self.runtimes, self.steps, self.told = self.runtimes + 1, 0, 0
        return self

    @contextmanager
    def step(self) -> Iterator[None]:
        """Count a step; other ranks get to know of one that takes long, see ``tell_of_long_steps``."""
        self.steps, self.since = self.steps + 1, time.monotonic()
        try:
            yield
        finally:
            self.since = None


def wait(
    store: dist.Store,
    keys: Sequence[str],
    patience: timedelta,
    meeting: str,
    members: Sequence[int],
    missing: Callable[[], list[int]],
) -> str:
    """Wait until *store* has all *keys*; return where another rank is that will not come, or "".

    *meeting* is the prefix of the keys of this meeting of *members*, and *missing* returns the ranks that are waited
    for. Raises DistStoreError when *patience* is over.
    """
    end, told = time.monotonic() + patience.total_seconds(), ""
    while True:
        left = end - time.monotonic()
        try:
            store.wait(list(keys), timedelta(seconds=max(0.01, min(left, _LOOK))))
        except dist.DistStoreError:
            if left <= _LOOK:
                raise
        else:
            if told:
                store.delete_key(told)
            return ""
        told = _key("at", members, dist.get_rank())
        store.set(told, meeting)
        for rank in missing():
            if found := _elsewhere(store, rank, meeting, members):
                return found


def _elsewhere(store: dist.Store, rank: int, meeting: str, members: Sequence[int]) -> str:
    """Return where *rank* is, if it will not come to *meeting*."""
    place, mine = Place.of(members), dist.get_rank()
    here = f"rank {mine} waits at {_occasion(meeting)!r} after step {place.steps}"
    key = _key("step", members, rank)
    if store.check([key]):
        runtimes, steps = json.loads(store.get(key))
        if (runtimes, steps) > (place.runtimes, place.steps):
            return (
                f"rank {rank} trains on, in step {steps}, and {here}: a call in which ranks meet, such as save, is one "
                "for all ranks, after the same step"
            )
    key = _key("at", members, rank)
    if store.check([key]):
        there = store.get(key).decode()
        if there != meeting and not store.check([f"{there}/result"]):
            return f"rank {rank} waits at {_occasion(there)!r}, and {here}: all ranks must make the same calls in order"
    return ""


def _occasion(meeting: str) -> str:
    """Return what the meeting with this prefix of keys is called in errors."""
    name = meeting.removeprefix("nemo_dist/").rpartition("/")[0]
    return re.sub(r" of \d+ ranks, \d+$", "", name)


def _key(what: str, members: Sequence[int], rank: int) -> str:
    return f"nemo_dist_{what}/{zlib.crc32(repr(tuple(members)).encode())}/{rank}"


_telling: threading.Thread | None = None


def tell_of_long_steps(store: dist.Store) -> None:
    """Start the thread that does so; it has a connection of its own to *store*, as one that waits blocks others."""
    global _telling
    if _telling is None or not _telling.is_alive():
        _telling = threading.Thread(target=_tell, args=(store.clone(), dist.get_rank()), daemon=True)  # type: ignore[attr-defined]
        _telling.start()


def _tell(store: dist.Store, rank: int) -> None:
    while True:
        time.sleep(_LOOK / 2)
        for place in list(_places.values()):
            since, steps = place.since, place.steps
            if since is not None and place.told != steps and time.monotonic() - since > _LOOK / 2:
                try:
                    store.set(_key("step", place.members, rank), json.dumps([place.runtimes, steps]))
                except RuntimeError:
                    return  # the process that has the store is gone
                place.told = steps
