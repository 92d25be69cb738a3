"""Join the process group, and say which device this process uses."""

from __future__ import annotations

import os
from datetime import timedelta

import attrs
import torch
import torch.distributed as dist

from nemo_dist.errors import RankError


@attrs.frozen
class DistEnv:
    """This process in its group: its rank in all and on this machine, and the torch ``device`` it uses."""

    backend: str
    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0


def initialize_distributed(backend: str | None = None, timeout_minutes: float = 10) -> DistEnv:
    """Join the process group, under torchrun or alone, and return this process's place in it.

    ``backend``: "nccl", "gloo", or None for what the machine has. ``timeout_minutes``: the limit of every collective. A
    process group that exists already is taken as it is.

    Raises RuntimeError for "nccl" without CUDA.
    """
    cuda = torch.cuda.is_available()
    if backend is not None and "nccl" in backend and not cuda:
        raise RuntimeError(f"backend {backend!r} needs CUDA, and this machine has none; use 'gloo'")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if cuda and backend != "gloo" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        chosen = backend or ("cpu:gloo,cuda:nccl" if cuda else "gloo")
        timeout = timedelta(minutes=timeout_minutes)
        if "RANK" in os.environ:
            dist.init_process_group(chosen, timeout=timeout)
        else:
            dist.init_process_group(chosen, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return DistEnv(
        backend=dist.get_backend(),
        rank=dist.get_rank(),
        local_rank=local_rank,
        world_size=dist.get_world_size(),
        device=device,
    )


def require_process_group() -> None:
    """Raise RankError when this process has joined no group."""
    if not dist.is_initialized():
        raise RankError("there is no process group to lay the mesh over; call initialize_distributed() first")


def default_device_type() -> str:
    """Return "cuda" where the process group can use it, else "cpu"."""
    nccl = dist.is_initialized() and "nccl" in str(dist.get_backend_config())
    return "cuda" if torch.cuda.is_available() and (nccl or not dist.is_initialized()) else "cpu"
