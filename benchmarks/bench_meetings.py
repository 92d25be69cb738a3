"""What a meeting in the store costs rank 0, at up to 16,384 ranks that agree; the others are played by a process.

The store is a real TCPStore, whose server runs in the process of rank 0, as in a run. The peer is what a gather costs:
rank 0 asks for the key of every rank, and reads them all.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from figures import Figure

from nemo_dist.mesh.meeting import Meeting

TITLE = "A meeting in which all ranks agree"
WORLDS = (64, 1024, 16384)
LIMIT_S = 1.0
_TIMES = 3


def measure() -> Iterator[Figure]:
    """Yield the CPU time of rank 0 itself, and of its process with the server of the store, at each world size."""
    for world in WORLDS:
        ours = [_meeting(world) for _ in range(_TIMES)]
        peer = [_gather(world) for _ in range(_TIMES)]
        last = world == WORLDS[-1]
        yield Figure(
            what=f"rank 0 of {world}",
            unit="s",
            ours=[one["rank"] for one in ours],
            peer=[one["rank"] for one in peer],
            against="a gather of one key per rank",
            limit=LIMIT_S if last else None,
        )
        yield Figure(
            what=f"rank 0 of {world}, with the server",
            unit="s",
            ours=[one["process"] for one in ours],
            peer=[one["process"] for one in peer],
            against="a gather of one key per rank",
        )
        yield Figure(what=f"keys left behind by {world} ranks", unit="", ours=[one["keys"] for one in ours])


def _meeting(world: int) -> dict[str, float]:
    """Return what a meeting of *world* ranks costs rank 0: CPU seconds, and the keys that are left."""

    def hold(store: dist.TCPStore, said: Any) -> None:
        meeting = Meeting(store, "meeting", range(world), 0)
        meeting.come(_VALUE)
        while not meeting.complete():
            time.sleep(1.0)  # as ranks of a world of this size wait
        if not meeting.agreed():
            raise RuntimeError("the ranks do not agree")
        meeting.leave()
        said.send("read")

    return _timed(_play_meeting, world, hold)


def _gather(world: int) -> dict[str, float]:
    def hold(store: dist.TCPStore, said: Any) -> None:
        keys = [f"gather/{rank}" for rank in range(1, world)]
        while not store.check(keys):
            time.sleep(1.0)
        store.multi_get(keys)
        store.set("gather/result", _VALUE)
        said.send("read")

    return _timed(_play_gather, world, hold)


_VALUE = "x" * 200


def _timed(others: Any, world: int, hold: Any) -> dict[str, float]:
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    before = server.num_keys()
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=others, args=(server.port, world, there))
    process.start()
    here.recv()
    mine, everything = time.thread_time(), time.process_time()
    hold(server, here)
    own = time.thread_time() - mine
    here.recv()
    found = {"rank": own, "process": time.process_time() - everything}
    process.join()
    return found | {"keys": server.num_keys() - before}


def _play_meeting(port: int, world: int, said: Any) -> None:
    store = dist.TCPStore("localhost", port, is_master=False, wait_for_workers=False)
    others = [Meeting(store, "meeting", range(world), rank) for rank in range(1, world)]
    said.send("ready")
    for meeting in others:
        meeting.come(_VALUE)
    said.recv()
    for meeting in others:
        if not (meeting.complete() and meeting.agreed()):
            raise RuntimeError("the ranks do not agree")
        meeting.leave()
    said.send("left")


def _play_gather(port: int, world: int, said: Any) -> None:
    store = dist.TCPStore("localhost", port, is_master=False, wait_for_workers=False)
    said.send("ready")
    for rank in range(1, world):
        store.set(f"gather/{rank}", _VALUE)
    said.recv()
    for _ in range(1, world):
        store.get("gather/result")
    said.send("left")
