"""Find the tensors that transformers keeps in float32 in a model of half precision: routers, attention sinks, ..."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import nn
from transformers.initialization import no_init_weights
from transformers.modeling_utils import local_torch_dtype as local_dtype

from nemo_dist import hf_model

_HALVES = (torch.bfloat16, torch.float16)


def dtypes_in(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the dtypes of parameters and buffers, by name, of a model like *model* that is loaded in *dtype*.

    No memory is taken.
    """
    made = model if any(one.dtype == dtype for one in model.parameters()) else _made_in(model, dtype)
    found = {name: tensor.dtype for name, tensor in (*made.named_parameters(), *made.named_buffers())}
    kept = [(re.compile(name.replace("*", ".*")), other) for name, other in hf_model.dtype_plan(made, dtype).items()]
    for name in made.state_dict() if kept else ():  # what no checkpoint has stays as it was made
        found[name] = next((other for pattern, other in kept if pattern.search(name)), found.get(name, dtype))
    return found


def _made_in(model: Any, dtype: torch.dtype) -> Any:
    config = copy.deepcopy(model.config)
    for one in (config, *(getattr(config, tower) for tower in hf_model.towers(model))):
        if one is not None:
            one.dtype = dtype  # in which a model makes its towers
    with local_dtype(dtype), no_init_weights(), torch.device("meta"):
        return hf_model.plain_class(model)(config)


def kept_in_float32(model: nn.Module, compute: torch.dtype | None) -> set[nn.Parameter]:
    """Return the parameters of *model* that stay in float32 while others are computed or stored in half precision."""
    stored = (parameter.dtype for parameter in model.parameters())
    half = next((dtype for dtype in (compute, *stored) if dtype in _HALVES), None)
    if half is None:
        return set()
    dtypes = dtypes_in(model, half)
    return {parameter for name, parameter in model.named_parameters() if dtypes.get(name) == torch.float32}
