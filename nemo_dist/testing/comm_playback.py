"""Play back what ranks communicated, as NCCL would run it in the worst case, and say where they wait for ever.

On gloo a send returns when the kernel has buffered it, a group is connected when it is made, and groups do not disturb
each other. NCCL is stricter, and this is what it needs, as far as its documentation and the sources of torch tell:

- A group without a bound device makes its communicator in its first operation, and each process waits there on the
  host until all members come. So all members take part in the first operation of each group. (Of a batch of messages
  torch says so; a message that is not in a batch goes over a communicator of its two ranks.) With a bound device
  (``device_id``), communicators are there from the start, and single messages use that of the group.
- Operations on one communicator run on one stream, in the order in which they were issued. So all members issue the
  same collectives in the same order, with the same sizes, and a send that nobody receives yet holds up what comes
  after it on that stream. How many bytes fit into buffers is not promised: none, here.
- Kernels of several communicators wait for each other's ranks while they hold the device, and whether two of them fit
  on a device at once is not promised. So all ranks issue the collectives of *all* groups in one order: were each of
  them to block its rank until all members have come, no rank would wait for ever.
- Processes also meet outside of NCCL, in the store, where each waits for all others; and when a group is made.

:func:`problems` plays a record by these rules. ``comm_recorder`` makes records.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence

import attrs


@attrs.frozen(kw_only=True)
class Meeting:
    """A point that no member passes before all have come: a collective, or with ``group`` None a meeting in the store.

    ``members`` are global ranks, ascending. ``what`` names it and ``size`` is its bytes, both equal on all members; a
    size of None is not compared.
    """

    group: str | None
    members: tuple[int, ...]
    what: str
    size: int | None = None


@attrs.frozen(kw_only=True)
class Message:
    """A tensor of ``size`` bytes from one global rank to another."""

    source: int
    target: int
    size: int


@attrs.frozen(kw_only=True)
class Post:
    """Messages that a rank starts to send or receive, together where ``batched``; a :class:`Wait` has its ``number``.

    ``members`` are the global ranks of ``group``.
    """

    number: int
    group: str
    members: tuple[int, ...]
    batched: bool
    messages: tuple[Message, ...]


@attrs.frozen
class Wait:
    """The rank waits until the messages of its post ``number`` are through."""

    number: int


Event = Meeting | Post | Wait


def problems(ranks: Sequence[Sequence[Event]], *, buffered: int = 0, bound_device: bool = False) -> list[str]:
    """Play back the events of every rank, ``ranks[r]`` those of global rank r; return what is wrong, nothing if right.

    ``buffered``: how many messages from one rank to another may be sent before the first is received.
    ``bound_device``: communicators are there from the start, and messages that are not batched use their group's.
    """
    return _Playback(ranks=ranks, buffered=buffered, bound_device=bound_device).run()


def problems_either_way(ranks: Sequence[Sequence[Event]]) -> list[str]:
    """Return what is wrong with or without a bound device, when nothing is buffered."""
    return [
        f"{way}: {problem}"
        for way, bound in (("without a bound device", False), ("with a bound device", True))
        for problem in problems(ranks, bound_device=bound)
    ]


@attrs.define(kw_only=True, eq=False)
class _Playback:
    """The state of a playback: how far each rank is, and the messages that are under way.

    ``queues`` has, for a rank and a communicator, its posts in order, each a number and the messages that are not
    through yet; only those of the first are under way. ``buffers`` has the sizes of messages that were sent and not
    yet received, by communicator, source and target. ``made``: the communicators that a rank has.
    """

    ranks: Sequence[Sequence[Event]]
    buffered: int
    bound_device: bool
    at: list[int] = attrs.field(init=False)
    queues: dict[tuple[int, str], deque[tuple[int, list[Message]]]] = attrs.field(factory=lambda: defaultdict(deque))
    buffers: dict[tuple[str, int, int], deque[int]] = attrs.field(factory=lambda: defaultdict(deque))
    through: set[tuple[int, int]] = attrs.field(factory=set)
    made: set[tuple[int, str]] = attrs.field(factory=set)
    found: list[str] = attrs.field(factory=list)

    def __attrs_post_init__(self) -> None:
        self.at = [0] * len(self.ranks)

    def run(self) -> list[str]:
        moving = True
        while moving:
            moving = False
            for rank in range(len(self.ranks)):
                while self._advances(rank):
                    moving = True
            for rank, channel in list(self.queues):
                while self._transfers(rank, channel):
                    moving = True
        return self.found + self._stuck()

    def _head(self, rank: int) -> Event | None:
        line = self.ranks[rank]
        return line[self.at[rank]] if self.at[rank] < len(line) else None

    def _advances(self, rank: int) -> bool:
        """Let *rank* pass its next event if it can."""
        event = self._head(rank)
        if event is None or not self._connected(rank, event):
            return False
        if isinstance(event, Meeting):
            return self._meets(event)
        if isinstance(event, Post):
            channel, _ = self._channel(event)
            self.queues[rank, channel].append((event.number, list(event.messages)))
        elif (rank, event.number) not in self.through:
            return False
        self.at[rank] += 1
        return True

    def _channel(self, event: Meeting | Post) -> tuple[str, tuple[int, ...]]:
        """Return the communicator of *event* and its members; an empty name for a meeting in the store."""
        if isinstance(event, Post) and not event.batched and not self.bound_device:
            pair = tuple(sorted((event.messages[0].source, event.messages[0].target)))
            return f"ranks {pair[0]} and {pair[1]} of {event.group}", pair
        return event.group or "", event.members

    def _connected(self, rank: int, event: Event) -> bool:
        """Whether *rank* has the communicator of *event*; it is made when all its members are about to use it first."""
        if self.bound_device or isinstance(event, Wait):
            return True
        channel, members = self._channel(event)
        if not channel or (rank, channel) in self.made:
            return True
        heads = [self._head(member) for member in members]
        if all(isinstance(head, Meeting | Post) and self._channel(head)[0] == channel for head in heads):
            self.made |= {(member, channel) for member in members}
            return True
        return False

    def _meets(self, event: Meeting) -> bool:
        """Let all members pass *event* if all are there, with nothing under way on its communicator."""
        heads = [self._head(member) for member in event.members]
        here = [
            head
            for head in heads
            if isinstance(head, Meeting)
            and (head.group, head.members) == (event.group, event.members)
            and (head.group is not None or head.what == event.what)
        ]
        if len(here) < len(heads) or any(self.queues.get((member, event.group or "")) for member in event.members):
            return False
        if len({(head.what, head.size) for head in here}) > 1:
            said = ", ".join(f"rank {rank} {_words(head)}" for rank, head in zip(event.members, here, strict=True))
            self.found.append(f"the ranks of a group do not do the same: {said}")
        for member in event.members:
            self.at[member] += 1
        return True

    def _transfers(self, rank: int, channel: str) -> bool:
        """Pass on one message that *rank* sends or receives first on *channel*."""
        queue = self.queues[rank, channel]
        if not queue:
            return False
        _, messages = queue[0]
        passed = next((message for message in messages if self._passes(rank, channel, message)), None)
        if passed is None:
            return False
        messages.remove(passed)
        self._settle(rank, channel)
        return True

    def _passes(self, rank: int, channel: str, message: Message) -> bool:
        """Whether *message* went on: into a buffer, out of one, or straight to a rank that receives it now."""
        buffer = self.buffers[channel, message.source, message.target]
        if message.target == rank:
            if buffer:
                self._compare(channel, message, buffer.popleft())
                return True
            return False  # the sender passes it on
        if len(buffer) < self.buffered:
            buffer.append(message.size)
            return True
        queue = self.queues.get((message.target, channel))
        awaited = queue[0][1] if queue else []
        wanted = next((m for m in awaited if (m.source, m.target) == (rank, message.target)), None)
        if buffer or wanted is None:
            return False
        self._compare(channel, wanted, message.size)
        awaited.remove(wanted)
        self._settle(message.target, channel)
        return True

    def _compare(self, channel: str, wanted: Message, sent: int) -> None:
        if wanted.size != sent:
            ends = f"rank {wanted.source} sends {sent} bytes over {channel}, and rank {wanted.target}"
            self.found.append(f"{ends} receives {wanted.size}")

    def _settle(self, rank: int, channel: str) -> None:
        """Take the first post of *rank* off its queue when all its messages are through."""
        queue = self.queues[rank, channel]
        if queue and not queue[0][1]:
            self.through.add((rank, queue.popleft()[0]))

    def _stuck(self) -> list[str]:
        """Say where ranks wait for ever, and which messages nobody takes."""
        waiting = []
        for rank in range(len(self.ranks)):
            event = self._head(rank)
            if event is not None:
                waiting.append(f"rank {rank} waits at event {self.at[rank]}, {self._meaning(rank, event)}")
        if waiting:
            return ["deadlock: " + "; ".join(waiting)]
        return [
            f"rank {rank} ends while {_words_of(messages)} over {channel} is under way"
            for (rank, channel), queue in self.queues.items()
            for _, messages in queue
        ]

    def _meaning(self, rank: int, event: Event) -> str:
        if isinstance(event, Wait):
            event = next(e for e in self.ranks[rank] if isinstance(e, Post) and e.number == event.number)
            return f"the end of {_words(event)}"
        channel, _ = self._channel(event)
        first = channel and not self.bound_device and (rank, channel) not in self.made
        return f"{'the first use of a communicator, ' if first else ''}{_words(event)}"


def _words(event: Meeting | Post) -> str:
    if isinstance(event, Post):
        return f"{'a batch of ' if event.batched else ''}{_words_of(event.messages)} over {event.group}"
    where = "the store" if event.group is None else event.group
    return f"{event.what}{'' if event.size is None else f' of {event.size} bytes'} over {where} {list(event.members)}"


def _words_of(messages: Sequence[Message]) -> str:
    return ", ".join(f"{one.source}->{one.target} ({one.size} bytes)" for one in messages)
