"""Initialise the process group, and choose the device of this process."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from typing import Any

import attrs
import torch
import torch.distributed as dist

from nemo_dist.errors import RankError
from nemo_dist.mesh.launch_env import Launch
from nemo_dist.mesh.live_groups import live
from nemo_dist.mesh.rank_status import tell_uncaught
from nemo_dist.mesh.rendezvous import join
from nemo_dist.mesh.store_consensus import set_patience
from nemo_dist.planning.validation import positive_minutes
from nemo_dist.torch_private import TIMEOUT

_LIMITED = ("gloo", "nccl")  # the backends of which torch can set the timeout of a group

_made_with: tuple[Any, timedelta | None] = (None, None)  # a process group, and the timeout of it


@attrs.frozen
class DistEnv:
    """The process group as this process sees it: backend, global and local rank, world size, torch device."""

    backend: str
    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0


def initialize_distributed(
    backend: str | None = None, timeout_minutes: float = 10, patience_minutes: float = 30
) -> DistEnv:
    """Join the process group of the ranks that were launched together, and return this process's place in it.

    The ranks may be started by torchrun, Slurm's srun, or mpirun (Open MPI, MPICH, Intel MPI); a process that none of
    them started is a group of one. ``backend``: "nccl", "gloo", or None for gloo on CPU tensors and, where CUDA is
    available, NCCL on CUDA tensors. ``timeout_minutes``: the timeout of every collective, where a setup has none of its
    own, and of waiting for the other ranks here. ``patience_minutes``: how long ranks wait for the slowest one where
    they meet to build, load, save and export, mostly for its disk. Sets the current CUDA device, unless CUDA is not
    available or the backend is "gloo": the one that this process sees, or the one with the number of its local rank. An
    existing process group is used unchanged: on the CPU without NCCL, else on the device that it is bound to, or the
    current one where no launcher says the local rank.

    Raises ValueError for times that are no positive number of minutes, RuntimeError for "nccl" without CUDA, and
    RankError for ranks without MASTER_ADDR and MASTER_PORT, for ranks that do not come, and for a local rank that has
    no device.
    """
    timeout = timedelta(minutes=positive_minutes("timeout_minutes", timeout_minutes))
    set_patience(patience_minutes)
    cuda = torch.cuda.is_available()
    if backend is not None and "nccl" in backend and not cuda:
        raise RuntimeError(f"backend {backend!r} needs CUDA, and this machine has none; use 'gloo'")
    launch = Launch.read() or Launch(rank=0, world_size=1, local_rank=None, told="no launcher")
    device = (_device_of_group() or choose_device(launch)) if cuda and backend != "gloo" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        chosen = backend or ("cpu:gloo,cuda:nccl" if cuda else "gloo")
        store = join(launch, timeout)
        dist.init_process_group(chosen, store=store, rank=launch.rank, world_size=launch.world_size, timeout=timeout)
        tell_uncaught()
    return DistEnv(
        backend=dist.get_backend(),
        rank=dist.get_rank(),
        local_rank=(device.index or 0) if launch.local_rank is None else launch.local_rank,
        world_size=dist.get_world_size(),
        device=device,
    )


def _device_of_group() -> torch.device | None:
    """Return the device that whoever made the process group has chosen; None where there is no group, or it is open."""
    if not dist.is_initialized():
        return None
    if default_device_type() == "cpu":
        return torch.device("cpu")
    bound = getattr(dist.group.WORLD, "bound_device_id", None)
    if isinstance(bound, torch.device) and bound.type == "cuda":
        return bound
    launch = Launch.read()
    known = launch is not None and launch.local_rank is not None
    return None if known else torch.device("cuda", torch.cuda.current_device())


def choose_device(launch: Launch) -> torch.device:
    """Return the CUDA device of this process: the only one that it sees, or the one of its local rank.

    Raises RankError where there is no such device, or the local rank is not known and there are several ranks.
    """
    count = torch.cuda.device_count()
    local_rank = launch.local_rank if launch.world_size > 1 else launch.local_rank or 0
    if count == 1:  # a launcher that gives each task a device of its own shows it no other
        return torch.device("cuda", 0)
    sees = f"this process sees {count} CUDA devices (CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')})"
    if local_rank is None:
        raise RankError(
            f"rank {launch.rank} of {launch.world_size} does not know which rank of its node it is, and {sees}; set "
            "LOCAL_RANK, from 0 up on every node"
        )
    if local_rank >= count:
        raise RankError(
            f"rank {launch.rank} of {launch.world_size} has the local rank {local_rank}, but {sees}; start at most "
            "one rank per device on a node, or let the launcher show each rank one device"
        )
    return torch.device("cuda", local_rank)


def require_process_group() -> None:
    """Raise RankError when no process group is initialised."""
    if not dist.is_initialized():
        raise RankError("there is no process group to lay the mesh over; call initialize_distributed() first")


def timeout_of_group() -> timedelta | None:
    """Return the timeout that the process group was made with; None where its backend knows none.

    torch gives a group that is made later the default of a backend in its place: half an hour beside gloo.
    """
    global _made_with
    if _made_with[0] is not dist.group.WORLD:  # read once, as the timeout of a mesh over all ranks is set on it too
        _made_with = dist.group.WORLD, _read_timeout(dist.group.WORLD)
    return _made_with[1]


def _read_timeout(world: Any) -> timedelta | None:
    with suppress(AttributeError, RuntimeError):  # a backend of another kind, or in torch's wrapper for debugging
        for device in world._device_types:
            backend = world._get_backend(device)
            if backend.name() in _LIMITED:
                found: timedelta = getattr(backend.options, TIMEOUT)
                return found
    return None


def make_group(ranks: tuple[int, ...]) -> None:
    """Make the process group that *ranks* share, ascending and some of all; all ranks call it, in the same order.

    A group that its members make alone has a name by the number of groups that each of them has. Where meshes over
    other ranks came before, that is not the same, and the members would wait for each other.
    """
    live.kept(ranks, lambda: dist.new_group(list(ranks), timeout=timeout_of_group()))


def refuse_part_of_bound(members: int) -> None:
    """Raise RankError for a mesh over fewer *members* than all ranks of a process group that is bound to a device.

    NCCL makes every group by splitting that of all ranks then, and those outside of the mesh do not come to it.
    """
    world, bound = dist.get_world_size(), getattr(dist.group.WORLD, "bound_device_id", None)
    if members < world and bound is not None:
        raise RankError(
            f"the mesh has {members} of the {world} ranks, and the process group is bound to {bound}, so that NCCL "
            "makes groups with all ranks only, and these would wait for the others for ever; initialise the process "
            "group without device_id, as initialize_distributed() does"
        )


def made_on_cpu() -> AbstractContextManager[Any]:
    """Within the context tensors are made on the CPU, whatever ``torch.set_default_device`` said."""
    # A device as a context costs time in every operation, so it is none where it would change nothing.
    return nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


def has_cpu_backend(group: dist.ProcessGroup | None = None) -> bool:
    """Whether *group*, None for all ranks, can run collectives on CPU tensors; gloo can, NCCL alone cannot."""
    return "cpu:" in str(dist.get_backend_config(group))


def default_device_type() -> str:
    """Return "cuda" where CUDA is available and the process group, if there is one, has NCCL; else "cpu"."""
    nccl = dist.is_initialized() and "nccl" in str(dist.get_backend_config())
    return "cuda" if torch.cuda.is_available() and (nccl or not dist.is_initialized()) else "cpu"
