"""Count what a process still holds: modules, tensors, meshes, process groups, and objects of our own classes."""

from __future__ import annotations

import gc
from collections import Counter

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

_KINDS = (nn.Module, Tensor, DeviceMesh, dist.ProcessGroup)
_OURS = "nemo_dist"


def live_objects() -> Counter[str]:
    """Return how many objects there are of each class of interest that nothing has let go of, after a collection.

    These are the classes of ``nemo_dist`` and of its plugins, and modules, tensors (DTensors too), device meshes and
    process groups of any class.
    """
    while gc.collect():  # what a finaliser lets go of is found by the next one
        pass
    return Counter(_name(kind) for kind in map(type, gc.get_objects()) if _counts(kind))


def grown(before: Counter[str], after: Counter[str]) -> dict[str, int]:
    """Return the classes that have more objects in *after* than in *before*, and how many more."""
    return dict(after - before)


def _counts(kind: type) -> bool:
    return issubclass(kind, _KINDS) or str(kind.__module__).partition(".")[0].startswith(_OURS)


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
