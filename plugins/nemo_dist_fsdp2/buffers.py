"""Give a forward that computes in another dtype its buffers as transformers has them in that dtype.

``fully_shard`` casts parameters and inputs, and leaves buffers as they are stored. A buffer that transformers would
hold in bfloat16 then meets the others in float32: products are promoted, and the next matrix product gets both dtypes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from nemo_dist.plugin.forwards import wrap_forward
from nemo_dist.torch_private import changes_in_place
from nemo_dist_fsdp2.dtypes import dtypes_in

_ALWAYS_FLOAT32 = ("inv_freq",)  # the frequencies of rope, which transformers computes in float32 in every dtype


def follow_compute_dtype(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Cast buffers of *model* around the forward of their module, where a model in *dtype* has them in another dtype.

    What is stored, saved and exported keeps its dtype.
    """
    floating = {name for name, one in model.named_buffers() if one.is_floating_point() and one.dtype != dtype}
    if dtype is None or all(name.endswith(_ALWAYS_FLOAT32) for name in floating):
        return
    wanted = dtypes_in(model, dtype)
    for prefix, module in model.named_modules():
        names = {name: f"{prefix}.{name}".removeprefix(".") for name, _ in module.named_buffers(recurse=False)}
        cast = {name: wanted[full] for name, full in names.items() if full in floating & wanted.keys()}
        cast = {name: kind for name, kind in cast.items() if kind != module.get_buffer(name).dtype}
        if cast:
            wrap_forward(module, partial(_with_buffers_cast, module, cast))


def _with_buffers_cast(
    module: nn.Module, cast: Mapping[str, torch.dtype], forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    stored = {name: module.get_buffer(name) for name in cast}
    given = {name: buffer.to(cast[name]) for name, buffer in stored.items()}
    versions = {name: changes_in_place(buffer) for name, buffer in given.items()}
    for name, buffer in given.items():
        setattr(module, name, buffer)
    try:
        return forward(*args, **kwargs)
    finally:
        for name, buffer in stored.items():
            left = module.get_buffer(name)
            if left is not given[name] or changes_in_place(left) != versions[name]:  # it counts something
                buffer.copy_(left)
            setattr(module, name, buffer)
