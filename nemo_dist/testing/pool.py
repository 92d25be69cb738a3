"""A pool of gloo ranks that live for a whole test session and run the functions that are sent to them."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import shutil
import signal
import socket
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import TracebackType
from typing import Any

import attrs

from nemo_dist.launcher.failures import describe_exit
from nemo_dist.testing import failure_report
from nemo_dist.testing.remote_call import Call, Reference, Reply
from nemo_dist.testing.temp_folders import scratch
from nemo_dist.testing.worker import THREADS, Seat, serve

# Imported once, in the server process from which the ranks are forked.
_PRELOAD = (
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.distributed.pipelining",
    "torch.distributed.checkpoint.state_dict",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "nemo_dist.testing.worker",
)
_START_TIMEOUT = 120.0
_GRACE = 2.0  # seconds that the other ranks get to report after the first failure
# Process groups that ranks keep between calls. The next call may use an equal mesh: half of a short run is making
# groups, and what DTensor finds out anew for every mesh. But each has threads and a connection to every member.
_MOST_GROUPS = 48
_MOST_FILES = 250  # open files of a rank above which its pool is replaced, as some process groups are never destroyed


@attrs.define(eq=False)
class _Rank:
    seat: Seat
    process: ForkServerProcess
    connection: connection.Connection

    def receive(self) -> Reply:
        """Read the reply that is due, or return one that describes how the process died."""
        try:
            if self.connection.poll():
                reply: Reply = pickle.loads(self.connection.recv_bytes())
                return reply
        except (EOFError, OSError):
            pass
        self.process.join(5)
        end = f"the process {describe_exit(self.process.exitcode or 0)}"
        stacks = failure_report.read(self.seat.stacks)
        return Reply(error=end, failure=f"{end}\n{stacks}" if stacks else end)

    def dump(self) -> str:
        """Return the stacks of all threads of the rank, even of one that is stuck inside a collective."""
        if self.process.pid is not None and self.process.is_alive():
            os.kill(self.process.pid, signal.SIGUSR1)
            for _ in range(20):
                time.sleep(0.05)
                if stacks := failure_report.read(self.seat.stacks):
                    return stacks
        return "(no stacks: the process did not answer)"


class RankPool:
    """Run functions on *world_size* ranks of one gloo process group on this machine's CPU.

    The ranks start at the first ``run`` and are reused by the next ones; after a failure they are replaced. A call may
    take *timeout* seconds, a collective *collective_timeout*. Use it as a context manager, or call ``close``.
    """

    def __init__(self, world_size: int, *, timeout: float = 120.0, collective_timeout: float = 60.0) -> None:
        if isinstance(world_size, bool) or not isinstance(world_size, int) or world_size < 1:
            raise ValueError(f"a pool needs a positive number of ranks (got {world_size!r})")
        self.world_size = world_size
        self.timeout = timeout
        self.collective_timeout = collective_timeout
        self._ranks: list[_Rank] = []
        self._folder: Path | None = None
        self._crowded = False
        self._stale = False  # whether the next call starts without groups

    def run(
        self,
        function: Callable[..., Any],
        /,
        *args: Any,
        ranks: Sequence[int] | None = None,
        timeout: float | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """Call *function* with the same arguments on every rank, or on *ranks*, and return the results in rank order.

        The function must be defined at the top of a module; arguments and results are pickled, plain CPU tensors
        included. Every call starts with random seed 0. Do not rely on other state of a previous call: ranks are
        replaced after a failure, and when they hold too many process groups. Raises :class:`RankFailure` with the
        traceback of the rank that failed first, or with the stacks of every hanging rank after *timeout* seconds.
        """
        __tracebackhide__ = True
        chosen = list(range(self.world_size)) if ranks is None else self._checked(ranks)
        limit = self.timeout if timeout is None else timeout
        apart = len(chosen) < self.world_size  # after that, the ranks no longer have the same groups
        call = Call(
            function=Reference.to(function),
            arguments=pickle.dumps((args, kwargs)),
            path=tuple(map(str, sys.path)),
            fresh=self._stale or apart,
        )
        with self._stopping_on_error():
            self._start()
            message = pickle.dumps(call)
            for rank in chosen:
                self._ranks[rank].connection.send_bytes(message)
            replies = self._collect(chosen, limit, f"{call.function.module}.{call.function.name}")
            self._stale = apart or any(reply.groups > _MOST_GROUPS for reply in replies.values())
            self._crowded = any(reply.open_files > _MOST_FILES for reply in replies.values())
            for line in failure_report.output({rank: self._ranks[rank].seat.output for rank in chosen}):
                print(line)  # pytest captures it and shows it only if the test fails
            return [pickle.loads(replies[rank].value) for rank in chosen]

    def close(self) -> None:
        """Kill the ranks; the next ``run`` starts new ones."""
        for rank in self._ranks:
            rank.process.kill()
        for rank in self._ranks:
            rank.process.join()
            rank.process.close()
            rank.connection.close()
        self._ranks = []
        self._crowded = False
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def __enter__(self) -> RankPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _checked(self, ranks: Sequence[int]) -> list[int]:
        chosen = list(ranks)
        if not chosen or len(set(chosen)) != len(chosen) or not set(chosen) <= set(range(self.world_size)):
            raise ValueError(f"ranks must be different numbers from 0 to {self.world_size - 1} (got {chosen})")
        return chosen

    @contextmanager
    def _stopping_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            # The other ranks may wait in a collective for ever, and ranks are out of step: start new ones.
            self.close()
            raise

    def _start(self) -> None:
        if self._ranks and not self._crowded and all(rank.process.is_alive() for rank in self._ranks):
            return
        self.close()
        self._folder = folder = scratch("pool")
        context = multiprocessing.get_context("forkserver")
        _start_server()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            for rank in range(self.world_size):
                seat = self._seat(rank, folder, listener)
                ours, theirs = context.Pipe()
                process = context.Process(target=serve, args=(seat, theirs), name=f"rank {rank}", daemon=True)
                process.start()
                theirs.close()
                self._ranks.append(_Rank(seat, process, ours))
        self._collect(list(range(self.world_size)), _START_TIMEOUT, "the start of the pool")

    def _seat(self, rank: int, folder: Path, listener: socket.socket) -> Seat:
        return Seat(
            rank=rank,
            world_size=self.world_size,
            folder=folder,
            listener=listener if rank == 0 else None,
            port=listener.getsockname()[1],
            collective_timeout=self.collective_timeout,
        )

    def _collect(self, chosen: list[int], limit: float, what: str) -> dict[int, Reply]:
        __tracebackhide__ = True
        deadline = time.monotonic() + limit
        replies: dict[int, Reply] = {}
        while len(replies) < len(chosen):
            ready = self._ready([rank for rank in chosen if rank not in replies], deadline - time.monotonic())
            if not ready:
                break
            for rank in ready:
                replies[rank] = self._ranks[rank].receive()
                if replies[rank].failed:
                    deadline = min(deadline, time.monotonic() + _GRACE)
        failed = {rank: reply for rank, reply in replies.items() if reply.failed}
        hanging = [rank for rank in chosen if rank not in replies]
        if failed:
            raise failure_report.failure(failed, hanging, what, self._outputs())
        if hanging:
            stacks = {rank: self._ranks[rank].dump() for rank in hanging}
            raise failure_report.hang(stacks, limit, what, self._outputs())
        return replies

    def _ready(self, ranks: list[int], timeout: float) -> set[int]:
        """Return those of *ranks* that replied or died within *timeout* seconds."""
        owners: dict[Any, int] = {}
        for rank in ranks:
            owners[self._ranks[rank].connection] = rank
            owners[self._ranks[rank].process.sentinel] = rank
        return {owners[one] for one in connection.wait(list(owners), max(0.0, timeout))}

    def _outputs(self) -> dict[int, Path]:
        return {rank.seat.rank: rank.seat.output for rank in self._ranks}


class RankPools:
    """Pools by world size, started on demand; at most *limit* run at a time, as ranks take memory and share cores.

    ``pools(4).run(function, ...)``; *timeout* and *collective_timeout*, in seconds, are those of each pool.
    """

    def __init__(self, limit: int = 2, *, timeout: float = 120.0, collective_timeout: float = 60.0) -> None:
        self.limit = limit
        self.timeout = timeout
        self.collective_timeout = collective_timeout
        self._pools: OrderedDict[int, RankPool] = OrderedDict()

    def __call__(self, world_size: int) -> RankPool:
        """Return the pool of *world_size* ranks; above the limit, close the least recently used pools."""
        if world_size not in self._pools:
            pool = RankPool(world_size, timeout=self.timeout, collective_timeout=self.collective_timeout)
            self._pools[world_size] = pool
        self._pools.move_to_end(world_size)
        while len(self._pools) > self.limit:
            self._pools.popitem(last=False)[1].close()
        return self._pools[world_size]

    def close(self) -> None:
        """Kill every rank."""
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()


def _start_server() -> None:
    """Start the server process that ranks are forked from: it imports torch and transformers, and starts no thread."""
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(THREADS)
    try:
        multiprocessing.get_context("forkserver").set_forkserver_preload(list(_PRELOAD))
        multiprocessing.forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
