"""Private names of torch that several modules need: each stands here, once.

``tests/test_imports.py`` reads the list. Plugins may import this module; a name that one module needs stands there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed._functional_collectives as _functional_collectives
from torch import Tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode
from torch.utils._pytree import tree_flatten, tree_map_only

__all__ = [
    "FUNCTIONAL_COLLECTIVES",
    "StridedShard",
    "TorchDispatchMode",
    "collective_operators",
    "current_dispatch_mode",
    "disable_current_modes",
    "functional_collectives",
    "run_after_backward",
    "storage_id",
    "tensors_in",
    "tree_map_only",
]

# A shard of a dim that another axis, or a packed projection, has cut before; torch has no public name for it yet.
StridedShard = _StridedShard
current_dispatch_mode = _get_current_dispatch_mode
disable_current_modes = _disable_current_modes

# The collectives as functions, and as the operators that those call: a dispatch mode sees operators, and selective
# recomputation can keep what they return.
functional_collectives: Any = _functional_collectives
collective_operators: Any = torch.ops._c10d_functional
FUNCTIONAL_COLLECTIVES = "_c10d_functional"  # the namespace of the operators, in their names


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors in nested containers, in order."""
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def storage_id(tensor: Tensor) -> int:
    """Return the identity of the storage of *tensor*, also of one on the meta device, which has no address."""
    return int(tensor.untyped_storage()._cdata)


def run_after_backward(function: Callable[[], None]) -> None:
    """Run *function* at the end of the backward that is under way; call it from a gradient hook."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.queue_callback(function)
