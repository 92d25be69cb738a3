"""Tell what torch's flash attention takes on a CUDA device: it stops with an error at anything else."""

from __future__ import annotations

import torch

_WIDEST = 256  # of a head
_STEP = 8  # of the width of a head
_FIRST_CAPABILITY = (8, 0)  # of a device


def has_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether *device* is a CUDA device with flash attention for numbers of *dtype*."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    return torch.cuda.get_device_capability(device) >= _FIRST_CAPABILITY


def takes_width(width: int) -> bool:
    """Whether it takes heads of this *width*, which nothing pads here."""
    return width <= _WIDEST and width % _STEP == 0
