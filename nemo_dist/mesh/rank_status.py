"""What ranks say of themselves in the store, for the errors of other ranks that wait for them.

A rank that fails writes why, and one that waits at a meeting writes where. A rank that waits for another, or loses it
in a collective, reads that and names it, in place of an error that says only that somebody is gone.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import TracebackType
from typing import NoReturn

import attrs
import torch.distributed as dist

from nemo_dist.errors import RankError
from nemo_dist.mesh import whereabouts
from nemo_dist.mesh.lost_peer import lost_a_peer

_GRACE = 5.0  # seconds after which a rank that said it failed, and did not come all the same, is believed
_LOOK = 2.0  # seconds to wait for the word of a rank that is gone; it may take longer to say it than to be missed
_FAR = 3.0  # seconds between two looks at what a rank that does not come does instead
_FAILED = "nemo_dist/failed"


@attrs.define(eq=False)
class _Status:
    steps: int = 0  # that this process has begun
    said: bool = False  # whether this rank has said that it failed


_status = _Status()


def default_store() -> dist.Store:
    """Return the store of the default process group; torch has no public API for this."""
    return dist.distributed_c10d._get_default_store()


def all_there(
    store: dist.Store, keys: Sequence[str], patience: timedelta, look: Callable[[], None] = lambda: None
) -> bool:
    """Wait until *store* has all *keys*, for at most *patience*; return whether it has. *look* may raise meanwhile.

    It asks again and again, because a wait inside the store cannot be interrupted, and writes warnings where it ends.
    The pauses grow with the time waited, of which they are a twentieth, up to 0.2 s.
    """
    start = time.monotonic()
    while not store.check(list(keys)):
        waited = time.monotonic() - start
        if waited > patience.total_seconds():
            return False
        look()
        time.sleep(min(max(waited / 20, 0.0005), 0.2))
    return True


def arrive(store: dist.Store, rank: int, members: Sequence[int], occasion: str, result: str) -> None:
    """Say that *rank* waits at a meeting of *members* for the key *result*; whatever failed before, it goes on."""
    if _status.said:
        _take_back(store, rank)
    whereabouts.arrive(store, rank, members, occasion, result)


def _take_back(store: dist.Store, rank: int) -> None:
    store.delete_key(f"{_FAILED}/{rank}")
    _status.said = False


def watch(
    store: dist.Store, members: Sequence[int], occasion: str, awaited: Sequence[int], prefix: str = ""
) -> Callable[[], None]:
    """Return a function to call at a meeting of *members*: it raises RankError when one of those *awaited* has failed.

    With the *prefix* of the meeting's keys it also does when one whose value is missing does something else meanwhile.
    """
    seen: dict[int, float] = {}
    last = far = time.monotonic()

    def look() -> None:
        nonlocal last, far
        now = time.monotonic()
        if now - last < 0.5:
            return
        last = now
        if now - far > _FAR:
            far = now
            for rank in [rank for rank in awaited if prefix and not store.check([f"{prefix}/{rank}"])]:
                if text := whereabouts.elsewhere(store, rank, members, occasion, f"{prefix}/result"):
                    raise RankError(text)
        found = _failures(store, awaited)
        for rank in set(seen) - set(found):
            del seen[rank]  # it goes on
        for rank in found:
            seen.setdefault(rank, now)
        if any(now - first > _GRACE for first in seen.values()):
            lines = "\n".join(f"- {line}" for line in found.values())
            raise RankError(f"ranks failed while this one waited for them at {occasion!r}:\n{lines}")

    return look


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
    if _status.said:  # an error before this was caught, and the rank goes on
        _take_back(default_store(), dist.get_rank())


def tell_uncaught() -> None:
    """From now on, have an error that ends this process told to the other ranks first; call it when all have joined."""
    before = sys.excepthook

    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, Exception) and dist.is_initialized() and dist.get_world_size() > 1:
            _say(error)
        before(kind, error, trace)

    sys.excepthook = tell


def _raise_explained(error: Exception) -> NoReturn:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        raise error
    if lost_a_peer(str(error)) and not isinstance(error, RankError):
        failure = RankError(
            f"step {_status.steps} lost another rank ({str(error).splitlines()[0]}):\n- "
            + "\n- ".join(_said_of_others())
        )
        _say(failure)
        raise failure from error
    _say(error)
    raise error


def _say(error: Exception) -> None:
    """Write the failure of this rank, unless it has said one; the store may be gone with its rank."""
    if _status.said:
        return
    rank = dist.get_rank()
    with suppress(RuntimeError):
        text = f"rank {rank} failed in step {_status.steps}: {type(error).__name__}: {error}"
        default_store().set(f"{_FAILED}/{rank}", text)
        _status.said = True


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
            if found := list(_failures(store, others).values()) or _waiting(store, others):
                return found
            time.sleep(0.1)
    return [unknown]


def _failures(store: dist.Store, ranks: Sequence[int]) -> dict[int, str]:
    failed = [rank for rank in ranks if store.check([f"{_FAILED}/{rank}"])]
    return {rank: store.get(f"{_FAILED}/{rank}").decode() for rank in failed}


def _waiting(store: dist.Store, ranks: Sequence[int]) -> list[str]:
    lines = []
    for rank in ranks:
        for meeting in whereabouts.meetings(store, rank):
            lines.append(
                f"rank {rank} waits at {meeting}; give all ranks equally many batches, or take them from "
                "runtime.batches(loader), and make calls in which ranks meet on all of them"
            )
    return lines
