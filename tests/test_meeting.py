"""Ranks that meet in a store agree at a constant cost while all say the same, and leave no key behind."""

import threading
from collections import Counter
from datetime import timedelta

import pytest
import torch.distributed as dist

from nemo_dist.errors import RankError
from nemo_dist.mesh import store_consensus
from nemo_dist.mesh.meeting import Meeting, count, read
from nemo_dist.mesh.store_consensus import consensus, differences, share

_LONG = 600  # seconds that nothing here takes


class PerThread(threading.local):
    """How often each occasion was used, by thread, as a thread is a rank here."""

    def __init__(self):
        self.counts = Counter()

    def __getitem__(self, name):
        return self.counts[name]

    def __setitem__(self, name, value):
        self.counts[name] = value


class PatiencePerThread(threading.local):
    """How long a rank waits, by thread; long, as the threads of a busy machine may come late."""

    patience = timedelta(seconds=_LONG)


@pytest.fixture(autouse=True)
def meetings(monkeypatch):
    monkeypatch.setattr(store_consensus, "_held", PerThread())
    monkeypatch.setattr(store_consensus, "_meetings", PatiencePerThread())


@pytest.fixture
def server():
    return dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)


def another(server):
    return dist.TCPStore("localhost", server.port, is_master=False, wait_for_workers=False)


def together(server, ranks, act):
    """Return what ``act(rank, store)`` returns or raises on a thread for each of *ranks*, in their order."""
    found = {}

    def go(rank):
        try:
            found[rank] = act(rank, another(server))
        except RankError as error:
            found[rank] = str(error)

    threads = [threading.Thread(target=go, args=[rank], daemon=True) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_LONG)
    return [found[rank] for rank in ranks]


RANKS = [1, 2, 4, 7]  # some of a process group


def test_equal_values_are_those_of_all_ranks_and_no_key_is_left(server):
    before = server.num_keys()

    def meet(rank, store):
        return [share("a meeting", {"step": 3}, None, RANKS, store, rank) for _ in range(3)]

    assert together(server, RANKS, meet) == [[[{"step": 3}] * 4] * 3] * 4
    assert server.num_keys() == before


def test_different_values_are_told_to_the_first_rank_and_no_key_is_left(server):
    before = server.num_keys()
    seen = []

    def decide(values):
        seen.append(values)
        return sum(values)

    def meet(rank, store):
        return consensus("a meeting", rank, decide, RANKS, store, rank)

    assert together(server, RANKS, meet) == [sum(RANKS)] * 4
    assert seen == [RANKS]  # on the first rank only
    assert server.num_keys() == before


def test_a_failure_is_raised_on_all_ranks_and_no_key_is_left(server):
    before = server.num_keys()

    def meet(rank, store):
        return share("a meeting", rank, RankError("no room") if rank == 4 else None, RANKS, store, rank)

    told = "a meeting failed on 1 of the ranks:\n- rank 4: RankError: no room"
    assert together(server, RANKS, meet) == [told, told, "no room", told]
    assert server.num_keys() == before


def test_an_error_of_what_the_first_rank_decides_is_raised_on_all(server):
    def meet(rank, store):
        return consensus("a meeting", rank, lambda values: values[9], RANKS, store, rank)

    assert together(server, RANKS, meet) == ["list index out of range"] * 4


def test_the_word_of_the_first_rank_is_heard_whatever_the_values_are(server):
    before = server.num_keys()

    def meet(rank, store):
        same = store_consensus.share_and_hear("a meeting", "same", None, RANKS, store, rank, word=f"of {rank}")
        return same, store_consensus.share_and_hear("a meeting", rank, None, RANKS, store, rank, word=f"of {rank}")

    assert together(server, RANKS, meet) == [((["same"] * 4, "of 1"), (RANKS, "of 1"))] * 4
    assert server.num_keys() == before


class Overheard:
    """A store that notes in an event when a rank says that it is there and waits."""

    def __init__(self, store, waits):
        self.store, self.waits = store, waits

    def set(self, key, value):
        self.store.set(key, value)
        if "/here/" in key:
            self.waits.set()

    def __getattr__(self, name):
        return getattr(self.store, name)


def test_a_rank_that_does_not_come_is_named_to_those_that_wait_and_told_when_it_comes(server):
    """The first rank comes when the others have said that they wait, and the last one when it has given up."""
    waits = {2: threading.Event(), 4: threading.Event()}

    def meet(rank, store):
        if rank == 1:
            assert all(event.wait(_LONG) for event in waits.values())
            store_consensus._meetings.patience = timedelta(seconds=0.1)
        heard = Overheard(store, waits[rank]) if rank in waits else store
        return consensus("a meeting", 0, len, RANKS, heard, rank)

    told = "ranks [7] did not come to 'a meeting' within 0:00:00.100000; look at their logs first"
    assert together(server, [1, 2, 4], meet) == [told] * 3
    assert together(server, [7], meet) == [told]


def test_a_meeting_goes_on_when_the_last_comes_while_the_first_gives_up(server):
    first, second = (Meeting(another(server), "m", [0, 1], rank) for rank in range(2))
    first.come(1)
    second.come(1)
    assert not first.give_up("too late")
    assert first.complete() and second.complete() and not second.given_up
    third, fourth = (Meeting(another(server), "n", [0, 1], rank) for rank in range(2))
    third.come(1)
    assert third.give_up("nobody comes")
    fourth.come(1)
    assert fourth.complete() and fourth.given_up and fourth.result() == {"failed": "nobody comes"}


class Counted:
    """A store that counts the requests to it."""

    def __init__(self, store):
        self.store, self.requests = store, 0

    def __getattr__(self, name):
        self.requests += 1
        return getattr(self.store, name)


def played(server, number):
    """Hold a meeting of *number* equal ranks, the others in a loop; return the requests of the first."""
    members = range(number)
    store = Counted(server)
    first = Meeting(store, f"meeting of {number}", members, 0)
    others = [Meeting(server, f"meeting of {number}", members, rank) for rank in members[1:]]
    for meeting in (*others, first):
        meeting.come("the same")
    assert first.complete() and first.agreed()
    first.leave()
    for meeting in others:
        assert meeting.complete() and meeting.agreed()
        meeting.leave()
    return store.requests


def test_what_a_meeting_costs_the_first_rank_does_not_grow_with_the_ranks(server):
    before = server.num_keys()
    assert played(server, 4) == played(server, 600) == 5
    assert server.num_keys() == before


def test_a_value_that_is_not_there_is_read_without_waiting(server):
    assert read(server, "nothing") is None and count(server, "nothing") == 0
    server.set("text", "found")
    server.add("number", 3)
    assert (read(server, "text"), count(server, "number")) == ("found", 3)
    assert not server.check(["nothing"])


def test_equal_answers_have_no_differences_and_others_are_named():
    assert differences([{"a": "1"}] * 3) == []
    assert differences([{"a": "1"}, {"a": "2"}, {"a": "1"}]) == ["a is 2 on rank 1, but 1 on the others"]
