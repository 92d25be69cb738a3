"""A rank of a pool: receive a function, run it, and send back its result or its failure."""

from __future__ import annotations

import faulthandler
import gc
import os
import pickle
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import attrs

from nemo_dist.testing.remote_call import Call, Reply

# One thread per rank: ranks share the cores, and a process with threads must not fork.
THREADS: Mapping[str, str] = dict.fromkeys(
    ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"
)


@attrs.frozen(kw_only=True)
class Seat:
    """What a rank needs to start: its number, its folder, and the store where ranks connect; times in seconds."""

    rank: int
    world_size: int
    folder: Path
    listener: socket.socket | None
    port: int
    collective_timeout: float

    @property
    def output(self) -> Path:
        """The file with the output of this rank."""
        return self.folder / f"rank{self.rank}.out"

    @property
    def stacks(self) -> Path:
        """The file to which this rank's stacks are written on request, or when it crashes."""
        return self.folder / f"rank{self.rank}.stacks"


def serve(seat: Seat, connection: Connection) -> None:
    """Join the process group and answer calls until the pool closes the connection."""
    _settle(seat)
    try:
        _join(seat)
    except Exception as error:
        connection.send_bytes(pickle.dumps(_failure(error)))
        return
    connection.send_bytes(pickle.dumps(Reply()))
    while True:
        try:
            call: Call = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            # Exit without cleanup: destroying a process group waits for peers, which may be gone.
            os._exit(0)
        for stream in (1, 2):
            os.ftruncate(stream, 0)
        connection.send_bytes(pickle.dumps(_answer(call)))


def _settle(seat: Seat) -> None:
    """Prepare this process as a rank: environment, captured output, stacks on request."""
    rank, size = str(seat.rank), str(seat.world_size)
    os.environ.update(THREADS, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(seat.port), TOKENIZERS_PARALLELISM="false")
    if sys.platform == "linux":
        # Otherwise gloo resolves the host's name, which many containers cannot.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # Ranks are killed in the end and clean nothing up: their temporary files go into the folder that the pool removes.
    os.environ["TMPDIR"] = tempfile.tempdir = str(seat.folder)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the pool's to handle
    output = os.open(seat.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    for text in (sys.stdout, sys.stderr):
        text.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    stacks = seat.stacks.open("w")
    faulthandler.enable(stacks)
    faulthandler.register(signal.SIGUSR1, stacks)
    gc.collect()
    gc.freeze()  # the preloaded modules: makes every later collection cheap and keeps their pages shared


def _join(seat: Seat) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    _share_device()
    timeout = timedelta(seconds=seat.collective_timeout)
    # The listening socket comes from the pool, so that no other process can take the port in between.
    listener: dict[str, Any] = {} if seat.listener is None else {"master_listen_fd": seat.listener.detach()}
    meet: Any = dist.TCPStore
    store = meet("127.0.0.1", seat.port, seat.world_size, is_master=seat.rank == 0, timeout=timeout, **listener)
    dist.init_process_group("gloo", store=store, rank=seat.rank, world_size=seat.world_size, timeout=timeout)


def _share_device() -> None:
    """Let all process groups of this rank share one gloo device.

    A device has a thread that wakes a hundred times a second, and torch makes one per group: with the groups of a dozen
    meshes that is a tenth of a core for each rank.
    """
    import torch.distributed.distributed_c10d as c10d

    from nemo_dist.torch_private import TIMEOUT

    gloo: Any = c10d.ProcessGroupGloo
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "")
    device = gloo.create_device(interface=interface) if interface else gloo.create_default_device()
    make = gloo.__init__

    def make_with_device(group: Any, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        options = gloo._Options()
        options._devices = [device]
        setattr(options, TIMEOUT, timeout)
        make(group, store, rank, size, options)

    gloo.__init__ = make_with_device


def _answer(call: Call) -> Reply:
    try:
        sys.path[:] = call.path
        function = call.function.find()
        arguments, keywords = pickle.loads(call.arguments)
        if call.fresh:
            _give_groups_back()
        _seed()
        value = function(*arguments, **keywords)
        return Reply(value=_pickled(value), open_files=len(os.listdir("/dev/fd")), groups=count_groups())
    except BaseException as error:  # SystemExit and pytest's outcomes too, so that the pool reports every failure
        return _failure(error)
    finally:
        gc.collect()
        sys.stdout.flush()
        sys.stderr.flush()


def _give_groups_back() -> None:
    """Destroy the process groups of earlier calls, which every rank has finished by now.

    The sharding cache of DTensor goes with them: it would reuse results of a mesh of an earlier call for an equal new
    one.
    """
    import torch.distributed as dist
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    from nemo_dist.mesh.live_groups import live

    live.forget()
    names = dist.distributed_c10d._world.pg_names
    for group, name in list(names.items()):
        # The default group stays, and so do groups with a hashed name: the name would be used again, while the store
        # still has the keys of the destroyed group.
        if group is not dist.group.WORLD and name.isdigit():
            dist.destroy_process_group(group)
    _clear_sharding_prop_cache()


def count_groups() -> int:
    """Return how many process groups this rank has."""
    import torch.distributed as dist

    return len(dist.distributed_c10d._world.pg_names)


def _seed() -> None:
    """Set the same random seeds before every call, so that a test's numbers do not depend on earlier tests."""
    import torch

    random.seed(0)
    torch.manual_seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)


def _pickled(value: object) -> bytes:
    try:
        return pickle.dumps(value)
    except Exception as error:
        raise TypeError(
            f"the call returned a {type(value).__name__} that cannot travel back; return plain values and plain "
            "tensors (full_tensor() of a DTensor)"
        ) from error


def _failure(error: BaseException) -> Reply:
    at = time.time()
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__ and frames.tb_next is not None:
        frames = frames.tb_next  # skip the frames of this module, which only hide those of the function
    text = "".join(traceback.format_exception(type(error), error, frames))
    line = "".join(traceback.format_exception_only(error)).strip()
    return Reply(failure=text, error=line or type(error).__name__, at=at)
