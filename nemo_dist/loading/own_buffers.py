"""Give buffers that no checkpoint has the values that a user's own class computes when it is made.

transformers makes a model without memory before it loads, so what ``__init__`` computes is lost, and ``_init_weights``
has to compute it again. Its own classes do. In a class that does not, such a buffer has whatever was in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.initialization import no_init_weights

from nemo_dist.hf_model import is_own_code, plain_class
from nemo_dist.loading.deferred_init import DeferredInit
from nemo_dist.torch_private import changes_in_place


def with_own_buffers(part: Any, initialise: Callable[[], None]) -> None:
    """Run *initialise* on *part*; then fill the buffers of the user's own classes that it left as they were."""
    before = {name: (buffer, changes_in_place(buffer)) for name, buffer in _own_buffers(part).items()}
    initialise()
    left = [
        name
        for name, buffer in _own_buffers(part).items()
        if name in before and before[name][0] is buffer and before[name][1] == changes_in_place(buffer)
    ]
    if left:
        made = _made(part)
        with torch.no_grad():
            for name in left:
                part.get_buffer(name).copy_(made[name])


def _own_buffers(part: Any) -> dict[str, Tensor]:
    """Return the buffers of the user's own classes in *part* that are not saved, by name."""
    return {
        name: buffer
        for name, buffer in part.named_non_persistent_buffers()
        if is_own_code(part.get_submodule(name.rpartition(".")[0]))
    }


def _made(part: Any) -> dict[str, Tensor]:
    """Return the buffers of a new model of the class and config of *part*; its weights take no memory."""
    with torch.random.fork_rng([]), torch.device("cpu"), no_init_weights(), DeferredInit() as init:
        twin: Any = plain_class(part)(copy.deepcopy(part.config))
        init.hollow(twin)
        return {name: init.value(name) for name in _own_buffers(twin)}
