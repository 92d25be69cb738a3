"""Cast what a forward computes on to the dtype of its parameters, and nothing else that it is given.

``fully_shard`` casts every floating tensor. Labels then lose digits, and a mask of the least float32 becomes minus
infinity in bfloat16. A model in bfloat16 on one process gets both as they are.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# In the names of what transformers' processors and models compute in float32 and hand on.
_ACTIVATIONS = ("hidden_states", "embeds", "features", "pixel_values", "input_values")


def cast_activations(module: nn.Module, dtype: torch.dtype | None) -> None:
    """From now on cast the floating activations that *module* is given to *dtype* (None: not).

    They are its first argument, the main inputs of models in it, and what is called so.
    """
    if dtype is None:
        return
    names = list(inspect.signature(module.forward).parameters)
    main = {getattr(inner, "main_input_name", "") for inner in module.modules()}
    module.register_forward_pre_hook(partial(_cast, names, {*names[:1], *main}, dtype), with_kwargs=True)


def _cast(names: list[str], main: set[str], dtype: torch.dtype, _: nn.Module, args: Any, kwargs: Any) -> Any:
    def given(name: str, value: Any) -> Any:
        computed = name in main or any(part in name for part in _ACTIVATIONS)
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if computed and floating and "mask" not in name else value

    named = [*names, *[""] * len(args)]
    own = tuple(given(name, value) for name, value in zip(named, args, strict=False))
    return own, {name: given(name, value) for name, value in kwargs.items()}
