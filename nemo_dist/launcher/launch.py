"""Start a module as several ranks on this machine, and stop all of them at the first failure or signal."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from nemo_dist.checkpoint.preemption import CODE
from nemo_dist.launcher.failures import describe_exit
from nemo_dist.launcher.worker import FOLDER, LAUNCHER
from nemo_dist.mesh.lost_peer import lost_a_peer

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

_SHUTDOWN = 5  # seconds between asking a rank to end and killing it, unless a command gives more
_LAST_LINES = 20  # lines of stderr shown for a rank that died without recording an error


@attrs.frozen(kw_only=True)
class Failure:
    """How one rank failed: one line, traceback or last output, exit code, and when (seconds since the epoch)."""

    rank: int
    error: str
    detail: str = ""
    code: int = 1
    at: float = float("inf")

    @property
    def order(self) -> tuple[int, float]:
        """Sort key, root cause first: errors of a rank's own, then killed ranks, then ranks that lost a peer."""
        if self.at == float("inf"):
            # An abort is how NCCL's watchdog leaves when a peer is lost, and SIGTERM is the launcher's own.
            return (3 if self.code in (-signal.SIGABRT, -signal.SIGTERM) else 1, self.at)
        return (2 if lost_a_peer(self.error) else 0, self.at)


def launch(entrypoint: str, args: Sequence[str], nproc: int, shutdown_seconds: int = _SHUTDOWN) -> int:
    """Run module *entrypoint* with *args* as *nproc* ranks, with torch's elastic launcher, and return the exit code.

    0 when every rank succeeded; the code of the rank that failed first when one failed (2 for a
    :class:`~nemo_dist.errors.NemoDistError`, 1 for other exceptions and for signals); 128 plus the signal's number when
    this process got SIGINT or another signal to stop, or the code of ranks that saved at it and ask to be run again. No
    rank outlives the call; at a signal each has *shutdown_seconds* to end by itself. One message on stderr names the
    rank that failed first, and why. Call it on the main thread, as it handles signals.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    with tempfile.TemporaryDirectory(prefix="nemo_dist_launch_") as name, _surroundings(Path(name), nproc):
        folder = Path(name)
        try:
            config = _config(folder, nproc, shutdown_seconds)
            elastic_launch(config, sys.executable)("-m", "nemo_dist.launcher.worker", entrypoint, *args)
        except ChildFailedError as error:
            exits = {rank: failure.exitcode for rank, failure in error.failures.items()}
            failures = sorted(_failures(folder, exits), key=lambda failure: failure.order)
            sys.stderr.write(_message(failures, nproc) + "\n")
            return failures[0].code if failures[0].code > 0 else 1
        except SignalException as stop:
            again = {failure.code for failure in _failures(folder, {})} == {CODE}
            return CODE if again else _stopped(stop.sigval, nproc)
        except KeyboardInterrupt:  # before the launcher handles signals
            return _stopped(signal.SIGINT, nproc)
    return 0


def _config(folder: Path, nproc: int, shutdown_seconds: int) -> LaunchConfig:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig

    # Only rank 0 writes to the terminal; the stderr of the others is shown only when one of them fails.
    redirects: Any = {rank: Std.NONE if rank == 0 else Std.ERR for rank in range(nproc)}
    known = hasattr(LaunchConfig, "shutdown_timeout")  # since torch 2.12
    optional: Any = {"shutdown_timeout": shutdown_seconds} if known else {}
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
        **optional,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder), redirects=redirects),
    )


@contextmanager
def _surroundings(folder: Path, nproc: int) -> Iterator[None]:
    """Set the environment of the ranks and silence the launcher's log; restore both and signal handlers at the end."""
    threads = max(1, (os.cpu_count() or 1) // nproc)
    wanted = {FOLDER: str(folder), LAUNCHER: str(os.getpid())}
    for name, value in {"OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": "lo"}.items():
        if name != "GLOO_SOCKET_IFNAME" or sys.platform == "linux":
            wanted[name] = os.environ.get(name, value)
    before = dict(os.environ)
    handlers = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)}
    level = logging.root.manager.disable
    os.environ.update(wanted)
    # The launcher logs every signal it sends and a banner of all failures; the one message here replaces them.
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(level)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.environ.clear()
        os.environ.update(before)


def _failures(folder: Path, exits: Mapping[int, int]) -> list[Failure]:
    """Return the failures that ranks recorded, and for the other ranks of *exits* how their processes ended."""
    found: dict[int, Failure] = {}
    for path in folder.glob("rank*.json"):
        rank = int(path.stem.removeprefix("rank"))
        try:
            record = json.loads(path.read_text())
        except (OSError, ValueError):  # half a record, of a disk that was full
            continue
        found[rank] = Failure(
            rank=rank, error=record["error"], detail=record["traceback"], code=record["code"], at=record["at"]
        )
    for rank, code in exits.items():
        if rank not in found:
            found[rank] = Failure(rank=rank, error=describe_exit(code), detail=_last_words(folder, rank), code=code)
    return list(found.values())


def _last_words(folder: Path, rank: int) -> str:
    for path in folder.glob(f"*/attempt_*/{rank}/stderr.log"):
        return "\n".join(path.read_text(errors="replace").rstrip().splitlines()[-_LAST_LINES:])
    return ""


def _message(failures: Sequence[Failure], nproc: int) -> str:
    first = failures[0]
    said = first.error if first.error.startswith(("was killed", "exited")) else f"failed: {first.error}"
    lines = [first.detail] if first.detail else []
    lines.append(f"rank {first.rank} of {nproc} {said}")
    for failure in failures[1:]:
        if failure.order[0] < 2:  # an error of the rank's own, not the loss of a peer
            lines.append(f"rank {failure.rank} also failed: {failure.error.splitlines()[-1]}")
    if nproc > 1:
        lines.append("all ranks were stopped")
    return "\n".join(lines)


def _stopped(number: int, nproc: int) -> int:
    sys.stderr.write(f"stopped by {signal.Signals(number).name}: all {nproc} ranks have ended\n")
    return 128 + number
