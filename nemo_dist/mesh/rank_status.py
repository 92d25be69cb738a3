"""What ranks say of themselves in the store, for the errors of other ranks that wait for them.

A rank that fails writes why, and one that waits at a meeting writes where. A rank that waits for another, or loses it
in a collective, reads that and names it, in place of an error that says only that somebody is gone.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import NoReturn

import attrs
import torch.distributed as dist

from nemo_dist.errors import RankError
from nemo_dist.mesh import whereabouts
from nemo_dist.mesh.lost_peer import lost_a_peer
from nemo_dist.mesh.meeting import SOON, count, read

_GRACE = 5.0  # seconds after which a rank that said it failed, and did not come all the same, is believed
_LOOK = 2.0  # seconds to wait for the word of a rank that is gone; it may take longer to say it than to be missed
_FAR = 3.0  # seconds between two looks at what a rank that does not come does instead
_MANY = 64  # ranks that one rank asks about
_FAILED = "nemo_dist/failed"


@attrs.define(eq=False)
class _Status:
    steps: int = 0  # that this process has begun
    slot: int = 0  # under which number this rank has said that it failed; 0 where it has not


_status = _Status()


def default_store() -> dist.Store:
    """Return the store of the default process group; torch has no public API for this."""
    return dist.distributed_c10d._get_default_store()


@attrs.define(eq=False)
class Watch:
    """What a rank does while it waits at a meeting of *members* whose keys begin with *prefix*.

    ``look`` raises RankError when one of those *awaited* has failed. Where *here*, this rank, is given, it also says
    after a second that this rank waits here, and raises when one of them does something else meanwhile.
    """

    store: dist.Store
    members: Sequence[int]
    occasion: str
    awaited: Sequence[int]
    prefix: str = ""
    here: int | None = None
    _start: float = attrs.field(factory=time.monotonic)
    _last: float = attrs.field(factory=time.monotonic)
    _far: float = attrs.field(factory=lambda: time.monotonic() + _FAR)
    _seen: dict[int, float] = attrs.field(factory=dict)
    _gone_on: set[int] = attrs.field(factory=set)
    _told: bool = False

    def look(self) -> None:
        """Look for others, at most twice in a second; called again and again while this rank waits."""
        now = time.monotonic()
        if now - self._last < 0.5:
            return
        self._last = now
        if self.here is not None:
            self._look_far(self.here, now)
        found = failures(self.store, self.awaited, self._gone_on)
        for rank in set(self._seen) - set(found):
            del self._seen[rank]  # it goes on
        for rank in found:
            self._seen.setdefault(rank, now)
        if any(now - first > _GRACE for first in self._seen.values()):
            lines = "\n".join(f"- {line}" for line in found.values())
            raise RankError(f"ranks failed while this one waited for them at {self.occasion!r}:\n{lines}")

    def _look_far(self, here: int, now: float) -> None:
        """Say where this rank is, and look where the others are, for at most a twentieth of the time."""
        if not self._told and now - self._start > SOON:
            whereabouts.arrive(self.store, here, self.members, self.occasion, self.prefix)
            self._told = True
        if now > self._far:
            for rank in self.awaited:
                if text := whereabouts.elsewhere(self.store, rank, self.members, self.occasion, self.prefix):
                    raise RankError(text)
            self._far = time.monotonic() + max(_FAR, 20 * (time.monotonic() - now))

    def go_on(self) -> None:
        """Take back that this rank waits."""
        if self._told and self.here is not None:
            whereabouts.go_on(self.store, self.here, self.members)


def goes_on(store: dist.Store, rank: int) -> None:
    """Take back that *rank*, this one, has failed: whatever it was, it goes on."""
    if _status.slot:
        store.delete_key(f"{_FAILED}/{_status.slot}")
        _status.slot = 0


@contextmanager
def step(progress: whereabouts.Progress) -> Iterator[None]:
    """Run a step of this rank, and count it; failures are told as by ``explained``."""
    _status.steps += 1
    with progress.step(), explained():
        yield


@contextmanager
def explained() -> Iterator[None]:
    """Run collectives; a failure is told to the other ranks, and one of theirs is told here.

    An error that only says that another rank is gone becomes a RankError that says what that rank said.
    """
    try:
        yield
    except Exception as error:
        _raise_explained(error)
    if _status.slot:  # an error before this was caught, and the rank goes on
        goes_on(default_store(), dist.get_rank())


def tell_uncaught() -> None:
    """From now on, have the other ranks told first when this process ends; call it when all have joined.

    An error that nobody catches is told, and so is an end without one while the process group lives: nothing else stops
    the ranks that wait for this one.
    """
    before, pid = sys.excepthook, os.getpid()

    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if dist.is_initialized() and dist.get_world_size() > 1:
            _say(_described(error))
        before(kind, error, trace)

    def tell_end() -> None:
        if os.getpid() == pid and dist.is_initialized() and dist.get_world_size() > 1:
            _say("its program came to its end, or called sys.exit, while other ranks may wait for it")

    sys.excepthook = tell
    atexit.register(tell_end)


def _raise_explained(error: Exception) -> NoReturn:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        raise error
    if lost_a_peer(str(error)) and not isinstance(error, RankError):
        failure = RankError(
            f"step {_status.steps} lost another rank ({str(error).splitlines()[0]}):\n- "
            + "\n- ".join(_said_of_others())
        )
        _say(_described(failure))
        raise failure from error
    _say(_described(error))
    raise error


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _say(failure: str) -> None:
    """Write the failure of this rank, unless it has said one; the store may be gone with its rank."""
    if _status.slot:
        return
    rank = dist.get_rank()
    with suppress(RuntimeError):
        text = f"rank {rank} failed in step {_status.steps}: {failure}"
        store = default_store()
        _status.slot = slot = store.add(f"{_FAILED}/count", 1)
        store.set(f"{_FAILED}/{slot}", json.dumps([rank, text]))


def _said_of_others() -> list[str]:
    """Return what other ranks say of themselves, one line each."""
    others = [rank for rank in range(dist.get_world_size()) if rank != dist.get_rank()]
    unknown = (
        "no rank says why: one was killed, ended early or does something else; look at the logs of the others. Ranks "
        "with different numbers of batches do so too: take them from runtime.batches(loader)"
    )
    with suppress(RuntimeError):
        store, deadline = default_store(), time.monotonic() + _LOOK
        while time.monotonic() < deadline:
            if found := list(failures(store, others).values()) or _waiting(store, others):
                return found
            time.sleep(0.1)
    return [unknown]


def failures(store: dist.Store, ranks: Sequence[int], gone_on: set[int] | None = None) -> dict[int, str]:
    """Return what those of *ranks* say that have failed, by rank; of many, the first ones.

    *gone_on*: the numbers of failures that were taken back, which are not looked at; new ones are added to it.
    """
    found: dict[int, str] = {}
    last = count(store, f"{_FAILED}/count")
    for slot in sorted(set(range(1, last + 1)) - (gone_on or set())):
        said = read(store, f"{_FAILED}/{slot}")
        if said is None:
            if gone_on is not None and slot < last:
                gone_on.add(slot)
            continue
        rank, text = json.loads(said)
        if rank in ranks:
            found[rank] = text
        if len(found) == _MANY:
            break
    return found


def _waiting(store: dist.Store, ranks: Sequence[int]) -> list[str]:
    lines = []
    for rank in ranks[:: 1 + len(ranks) // _MANY]:
        for meeting in whereabouts.meetings(store, rank):
            lines.append(
                f"rank {rank} waits at {meeting}; give all ranks equally many batches, or take them from "
                "runtime.batches(loader), and make calls in which ranks meet on all of them"
            )
    return lines
