"""Apply DistributedDataParallel in place, through torch's composable ``replicate``; the model keeps its class."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch.distributed._composable.replicate import replicate as torch_replicate

from nemo_dist import Role

if TYPE_CHECKING:
    from torch import nn

    from nemo_dist.mesh.mesh_context import MeshContext


def replicate(part: nn.Module, mesh: MeshContext, options: dict[str, Any]) -> None:
    """Average the gradients of *part* over the data-parallel ranks during every backward."""
    group = mesh.group(Role.TOKENS)
    if group is not None:
        # Searching for unused parameters is a precaution: that there are none is no news.
        warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
        torch_replicate(part, process_group=group, **options)


@contextmanager
def unsynchronised(parts: list[nn.Module]) -> Iterator[None]:
    """Within the context, leave gradients of *parts* local: a backward communicates nothing."""
    replicated = [part for part in parts if hasattr(part, "set_requires_gradient_sync")]
    for part in replicated:
        part.set_requires_gradient_sync(False)  # type: ignore[operator]
    try:
        yield
    finally:
        for part in replicated:
            part.set_requires_gradient_sync(True)  # type: ignore[operator]
