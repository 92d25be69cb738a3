"""Initialise the process group, and choose the device of this process."""

from __future__ import annotations

import os
from datetime import timedelta

import attrs
import torch
import torch.distributed as dist

from nemo_dist.errors import RankError


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


def initialize_distributed(backend: str | None = None, timeout_minutes: float = 10) -> DistEnv:
    """Initialise the process group, under torchrun or with a single process, and return this process's place in it.

    ``backend``: "nccl", "gloo", or None for gloo on CPU tensors and, where CUDA is available, NCCL on CUDA tensors.
    ``timeout_minutes``: the timeout of every collective. An existing process group is used unchanged. Sets the current
    CUDA device to ``LOCAL_RANK``, unless CUDA is not available or the backend is "gloo".

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
    """Raise RankError when no process group is initialised."""
    if not dist.is_initialized():
        raise RankError("there is no process group to lay the mesh over; call initialize_distributed() first")


def default_device_type() -> str:
    """Return "cuda" where CUDA is available and the process group, if there is one, has NCCL; else "cpu"."""
    nccl = dist.is_initialized() and "nccl" in str(dist.get_backend_config())
    return "cuda" if torch.cuda.is_available() and (nccl or not dist.is_initialized()) else "cpu"
