"""Seed the random generators of the ranks: unlike where ranks read different batches, alike where they share one."""

from __future__ import annotations

import hashlib
import random
import sys
from typing import TYPE_CHECKING

import torch

from nemo_dist.planning.mesh_plan import Role
from nemo_dist.planning.validation import LARGEST_SEED, integer

if TYPE_CHECKING:
    from nemo_dist.mesh.mesh_context import MeshContext


def seed_of(seed: int, place: int) -> int:
    """Return the seed of the ranks with the data-parallel coordinate *place*: *seed* itself for the first."""
    if place == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}/{place}".encode(), digest_size=8).digest(), "big") >> 1


def seed_rank(mesh: MeshContext, seed: int) -> None:
    """Seed this rank's generators; see :meth:`nemo_dist.DistributedSetup.seed`."""
    own = seed_of(integer("seed", seed, 0, LARGEST_SEED), mesh.rank(Role.BATCH))
    torch.manual_seed(own)  # of all devices
    random.seed(own)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(own % 2**32)
