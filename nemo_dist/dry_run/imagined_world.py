"""A process group whose other ranks are imagined: collectives return at once, and all say what this rank says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # noqa: F401  (registers the backend)
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_param

from nemo_dist.errors import RankError
from nemo_dist.mesh.live_groups import live


@contextmanager
def imagined_world(world_size: int, rank: int) -> Iterator[None]:
    """Within the context, this process is *rank* of *world_size* ranks of torch's fake process group.

    Raises RankError for a rank that the world does not have, and where there is a process group already.
    """
    if not 0 <= rank < world_size:
        raise RankError(f"there is no rank {rank} of {world_size}; ranks are numbered from 0")
    if dist.is_initialized():
        raise RankError("this process is a rank of a process group; make a dry run in a process of its own")
    # torch's own fake store has no methods at all, and torch writes a few values when groups are made
    dist.init_process_group(dist.Backend.FAKE, store=dist.HashStore(), rank=rank, world_size=world_size)
    try:
        with patch.object(_fsdp_param, "_chunk_with_empty", Chunks):
            yield
    finally:
        live.forget()
        dist.destroy_process_group()


class Chunks:
    """The chunks of a tensor along a dim, each made when it is asked for; FSDP2 makes all of them to take one.

    With thousands of ranks that is most of what sharding a model on the meta device takes.
    """

    def __init__(self, tensor: Tensor, num_chunks: int, dim: int) -> None:
        self.tensor, self.dim = tensor, dim
        self.size = -(-tensor.size(dim) // num_chunks)

    def __getitem__(self, index: int) -> Tensor:
        start = index * self.size
        left = self.tensor.size(self.dim) - start
        return self.tensor.narrow(self.dim, start, min(self.size, left)) if left > 0 else self.tensor.new_empty(0)
