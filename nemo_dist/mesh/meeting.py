"""A meeting of ranks in the store: all say a small value, and all learn what follows from the values of all.

A rank says two things, which cost the same for any number of ranks: it counts itself among those that say the same (by
a digest), then among those that have come. When all have come, a rank whose digest was counted as often as there are
ranks knows the values of all: they are its own. Only when they differ, every rank writes its value, and the first rank
reads them all and writes the result. The last rank to leave deletes the keys.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import attrs
import torch.distributed as dist

DIGEST_SIZE = 16
SOON = 1.0  # seconds after which a rank that waits says where it is
_ENDED = 1 << 40  # added to the number of those that have come when the first rank gives the meeting up
_NOTHING = "-"  # what `compare_set` returns for a key that is not there, as it is told to expect this
_RATE = 16_000  # how often all ranks together ask the store in a second, at most


def wait_until(
    done: Callable[[], bool], patience: timedelta, look: Callable[[], None] = lambda: None, ranks: int = 1
) -> bool:
    """Wait until *done* for at most *patience*; return whether it is. *look* may raise meanwhile.

    It asks again and again, because a wait inside the store cannot be interrupted, and writes warnings where it ends.
    The pauses grow with the time waited, of which they are a twentieth, up to 0.2 s; they are longer where many *ranks*
    ask at the same time.
    """
    start = time.monotonic()
    least = max(0.0005, ranks / _RATE)
    while not done():
        waited = time.monotonic() - start
        if waited > patience.total_seconds():
            return False
        look()
        time.sleep(min(max(waited / 20, least), max(0.2, least)))
    return True


def read(store: dist.Store, key: str) -> str | None:
    """Return the value of *key* as it is now; None where there is none. ``get`` would wait for one."""
    found = store.compare_set(key, _NOTHING, _NOTHING).decode()
    return None if found == _NOTHING else found


def count(store: dist.Store, key: str) -> int:
    """Return what was added to *key* until now, without making it."""
    return int(read(store, key) or 0)


@attrs.define(eq=False)
class Meeting:
    """A meeting of *members* whose keys begin with *prefix*, as rank *rank* of the process group sees it.

    ``word`` is a JSON value of the first of the members, which all learn whatever their own values are.
    """

    store: dist.Store
    prefix: str
    members: Sequence[int]
    rank: int
    given_up: bool = attrs.field(default=False, init=False)
    _value: str = attrs.field(default="", init=False)
    _digest: str = attrs.field(default="", init=False)
    _first_to_say: bool = attrs.field(default=False, init=False)
    _start: float = attrs.field(factory=time.monotonic, init=False)
    _said_here: bool = attrs.field(default=False, init=False)
    _in_full: bool = attrs.field(default=False, init=False)

    @property
    def leads(self) -> bool:
        """Whether this is the first of the members."""
        return self.rank == self.members[0]

    @property
    def mine(self) -> Any:
        """The value of this rank, as the others would read it."""
        return json.loads(self._value)

    def come(self, mine: Any, word: Any = None) -> None:
        """Say the value of this rank, and on the first one the *word*."""
        self._value = json.dumps(mine)
        self._digest = hashlib.blake2b(self._value.encode(), digest_size=DIGEST_SIZE).hexdigest()
        if self.leads and word is not None:
            self.store.set(self._key("word"), json.dumps(word))
        self._first_to_say = self.store.add(self._key(self._digest), 1) == 1
        self.store.add(self._key("came"), 1)

    def stay(self) -> None:
        """Say, after a second of waiting, that this rank is here, as the counts do not tell who is."""
        if not self._said_here and time.monotonic() - self._start > SOON:
            self.store.set(self._key(f"here/{self.rank}"), "")
            self._said_here = True

    def absent(self) -> list[int]:
        """Return the members that have not said that they are here."""
        others = [member for member in self.members if member != self.rank]
        return [member for member in others if not self.store.check([self._key(f"here/{member}")])]

    def complete(self) -> bool:
        """Whether all have come, or the first rank has given the meeting up."""
        came = self.store.add(self._key("came"), 0)
        self.given_up = came >= _ENDED and self.decided()
        return self.given_up or len(self.members) <= came < _ENDED

    def agreed(self) -> bool:
        """Whether the values of all ranks, which have come, are that of this one."""
        return self.store.add(self._key(self._digest), 0) == len(self.members)

    def word(self) -> Any:
        """Return the word of the first rank; None where it has none."""
        found = read(self.store, self._key("word"))
        return None if found is None else json.loads(found)

    def give_up(self, why: str) -> bool:
        """End the meeting for all ranks, on the first one, and for those that come later; False where all have come."""
        if self.store.add(self._key("came"), _ENDED) - _ENDED >= len(self.members):
            self.store.add(self._key("came"), -_ENDED)
            return False
        self.decide({"failed": why})
        return True

    def tell(self) -> None:
        """Write the value of this rank, as the values differ."""
        self._in_full = True
        self.store.set(self._key(f"value/{self.rank}"), self._value)
        self.store.add(self._key("told"), 1)

    def told(self) -> bool:
        """Whether all ranks have written their values."""
        return self.store.add(self._key("told"), 0) == len(self.members)

    def values(self) -> list[Any]:
        """Return what all ranks have told, in the order of the members."""
        keys = [self._key(f"value/{member}") for member in self.members]
        return [json.loads(value) for value in self.store.multi_get(keys)]

    def decided(self) -> bool:
        """Whether the first rank has written the result."""
        return self.store.check([self._key("result")])

    def decide(self, result: dict[str, Any]) -> None:
        """Write the result for all."""
        self.store.set(self._key("result"), json.dumps(result))

    def result(self) -> dict[str, Any]:
        """Return the result that the first rank wrote."""
        found: dict[str, Any] = json.loads(self.store.get(self._key("result")))
        return found

    def leave(self) -> None:
        """Say that this rank has read all that it needs; the last one deletes the keys."""
        if self._said_here:
            self.store.delete_key(self._key(f"here/{self.rank}"))
        if self._in_full:
            self.store.delete_key(self._key(f"value/{self.rank}"))
            if self._first_to_say:
                self.store.delete_key(self._key(self._digest))  # all have told, so nobody asks for it again
        if self.store.add(self._key("came"), 1) == 2 * len(self.members):
            for what in ("word", "told", "result", self._digest, "came"):
                self.store.delete_key(self._key(what))

    def left(self) -> bool:
        """Whether all ranks have left."""
        return not self.store.check([self._key("came")])

    def _key(self, what: str) -> str:
        return f"{self.prefix}/{what}"
