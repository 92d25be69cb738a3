"""Copy tensors to host memory before training changes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from nemo_dist.errors import CheckpointError

_ALIGNED = 64  # bytes

# Memory that CUDA copies into at full speed; made once, as locking its pages takes as long as copying into new ones.
_locked: Tensor | None = None


def to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of *tensors* on the CPU; when this returns, the originals may be changed.

    Copies of CUDA tensors share one page-locked buffer that the next call uses again: they must not be needed by then.
    """
    copies = {name: tensor.detach().clone() for name, tensor in tensors.items() if tensor.device.type == "cpu"}
    there = {name: tensor.detach() for name, tensor in tensors.items() if name not in copies}
    if not there:
        return copies
    starts, total = _laid_out(there)
    buffer = _page_locked(total)
    for name, tensor in there.items():
        part = buffer[starts[name] : starts[name] + tensor.nbytes]
        copies[name] = part.view(tensor.dtype).view(tensor.shape)
        copies[name].copy_(tensor, non_blocking=True)
    settle(there)
    return copies


def settle(tensors: Mapping[str, Tensor]) -> None:
    """Wait until what the current streams compute or copy is there, for a thread or a host that reads it next."""
    for device in {tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"}:
        torch.cuda.current_stream(device).synchronize()


def _laid_out(tensors: Mapping[str, Tensor]) -> tuple[dict[str, int], int]:
    """Return where each tensor starts in a buffer of bytes, and how long that is."""
    starts, total = {}, 0
    for name, tensor in tensors.items():
        starts[name] = total
        total += math.ceil(tensor.nbytes / _ALIGNED) * _ALIGNED
    return starts, total


def _forget_error() -> None:
    """Let CUDA forget a call that failed, of which it would tell at the start of the next kernel, whatever that is."""
    with suppress(RuntimeError):
        torch.zeros(1, device="cuda").add_(1)


def _page_locked(size: int) -> Tensor:
    """Return a buffer of at least *size* bytes; torch's own pinned memory would round up to a power of two.

    Raises CheckpointError when CUDA cannot lock so much.
    """
    global _locked
    if not size:  # a rank whose shards are all empty; CUDA locks no empty range
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    if _locked is None or len(_locked) < size:
        cuda: Any = torch.cuda.cudart()
        if _locked is not None:
            cuda.cudaHostUnregister(_locked.data_ptr())
            _locked = None
        made = torch.empty(size, dtype=torch.uint8, device="cpu")
        code = cuda.cudaHostRegister(made.data_ptr(), size, 0)
        if code != cuda.cudaError.success:
            _forget_error()
            raise CheckpointError(
                f"CUDA cannot lock {size} bytes of host memory for an asynchronous save ({code}); save without "
                "asynchronous=True, or give this process more memory"
            )
        _locked = made
    return _locked
