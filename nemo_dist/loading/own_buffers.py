"""Give buffers that a checkpoint lacks the values that a user's own class computes when it is made.

transformers makes a model without memory before it loads, so what ``__init__`` computes is lost, and ``_init_weights``
has to compute it again. Its own classes do. In a class that does not, such a buffer has whatever was in memory, and so
has one of a module of transformers whose ``_init_weights`` the class replaced.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from transformers.initialization import no_init_weights

from nemo_dist.hf_model import INITIALIZED, has_own_code, plain_class
from nemo_dist.loading.deferred_init import DeferredInit
from nemo_dist.torch_private import changes_in_place


def with_own_buffers(part: Any, initialise: Callable[[], None]) -> None:
    """Run *initialise* on *part*; then fill the buffers that it left as they were, if a user's own class is in it."""
    if not has_own_code(part):
        initialise()
        return
    lacking = [(name, one) for name, one in part.named_buffers() if not getattr(one, INITIALIZED, False)]
    before = {name: (buffer, changes_in_place(buffer)) for name, buffer in lacking}
    initialise()
    left = [
        name
        for name, buffer in part.named_buffers()
        if name in before and before[name][0] is buffer and before[name][1] == changes_in_place(buffer)
    ]
    if left:
        made = _made(part, left)
        with torch.no_grad():
            for name in left:
                part.get_buffer(name).copy_(made[name])


def _made(part: Any, names: Collection[str]) -> dict[str, Tensor]:
    """Return the buffers *names* of a new model of the class and config of *part*; its weights take no memory."""
    with torch.random.fork_rng([]), torch.device("cpu"), no_init_weights(), DeferredInit() as init:
        init.hollow(plain_class(part)(copy.deepcopy(part.config)))
        return {name: init.value(name) for name in names}
