"""What the launcher of this process says in the environment: which rank it is, of how many, and which on its node.

torchrun, Open MPI, MPICH and Intel MPI, and Slurm are known. No torch here: planning reads the number of ranks too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import attrs

from nemo_dist.errors import RankError
from nemo_dist.planning.validation import shown, whole_number

_MOST = 2**31 - 1  # torch counts ranks so far
ALONE = "for one process by itself, set RANK=0 and WORLD_SIZE=1"


@attrs.frozen
class Launcher:
    """The names of the variables in which a launcher gives rank, number of ranks, and local rank."""

    name: str
    rank: str
    world_size: str
    local_rank: str


# The first one whose rank is set counts: in a batch job Slurm's variables of the whole job are set for ranks of mpirun.
LAUNCHERS = (
    Launcher("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    Launcher("Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    Launcher("Hydra (MPICH, Intel MPI)", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    Launcher("Slurm", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)


@attrs.frozen(kw_only=True)
class Launch:
    """The place of this process among the ranks that one launcher started.

    ``local_rank`` is None where nothing says it; ``told`` says where rank and size are from, for errors.
    """

    rank: int
    world_size: int
    local_rank: int | None
    told: str

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> Launch | None:
        """Return what the launcher said, or None when no launcher did.

        Raises RankError for a rank without a number of ranks or the other way round, for launchers that contradict
        ``WORLD_SIZE``, and for values that are no such numbers.
        """
        found = next((launcher for launcher in LAUNCHERS if launcher.rank in environment), None)
        size = _number(environment, "WORLD_SIZE")
        if found is None:
            if size is not None and size > 1:
                raise RankError(
                    f"WORLD_SIZE is {size}, but nothing says which rank this process is (none of "
                    f"{', '.join(launcher.rank for launcher in LAUNCHERS)} is set); start it with torchrun, srun or "
                    f"mpirun, or, {ALONE}"
                )
            return None
        rank, own = _number(environment, found.rank), _number(environment, found.world_size)
        own = size if own is None else own
        told = f"{found.name}: {found.rank}={rank}, {found.world_size}={own}"
        if rank is None or own is None:
            raise RankError(f"{found.rank} is {rank}, but {found.world_size} is not set; set both")
        if size is not None and size != own:
            raise RankError(
                f"WORLD_SIZE is {size}, but the launcher started {own} ranks ({told}); unset it, or set RANK"
            )
        if rank >= own:
            raise RankError(f"there is no rank {rank} of {own} ({told}); ranks are numbered from 0")
        return cls(rank=rank, world_size=own, local_rank=_local_rank(environment, rank), told=told)


def launched_world_size(environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of ranks that the launcher started; 1 without a launcher."""
    if "RANK" not in environment and "WORLD_SIZE" in environment:
        return _number(environment, "WORLD_SIZE") or 1
    launch = Launch.read(environment)
    return 1 if launch is None else launch.world_size


def launched_rank(environment: Mapping[str, str] = os.environ) -> int:
    """Return the rank that ``RANK`` says; 0 without it."""
    return _number(environment, "RANK") or 0


def _local_rank(environment: Mapping[str, str], rank: int) -> int | None:
    """Return the rank on this node as the first launcher says it that gave this process the same *rank*.

    Several may have: RANK is often set by hand from another's. What a batch job has for mpirun's ranks is not theirs.
    """
    for launcher in LAUNCHERS:
        if launcher.local_rank in environment and _number(environment, launcher.rank) == rank:
            return _number(environment, launcher.local_rank)
    return None


def _number(environment: Mapping[str, str], name: str) -> int | None:
    """Return the variable *name* as a number from 0 up; None where it is not set. Raises RankError for another text."""
    text = environment.get(name)
    if text is None:
        return None
    found = whole_number(text, _MOST)
    if found is None:
        raise RankError(f"{name} is {shown(text)} in the environment, which is no number from 0 up")
    return found
