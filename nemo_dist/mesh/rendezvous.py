"""Find the other ranks of this run, and a store that only they use.

torchrun gives all attempts of a run one store (``--max-restarts``), in which the addresses that ranks of an earlier
attempt wrote still stand. A rank that reads one waits for a process that is gone. So the ranks of an attempt first
agree on a name for it, under which all that they write stands apart.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from nemo_dist.errors import RankError
from nemo_dist.mesh.launch_env import ALONE, Launch
from nemo_dist.mesh.meeting import wait_until
from nemo_dist.planning.validation import shown, whole_number

_NAME = "nemo_dist/attempt"  # the name that rank 0 gave to the newest attempt
_LOOK_AGAIN = timedelta(seconds=1)
_LAST_PORT = 65535


def join(launch: Launch, timeout: timedelta) -> dist.Store:
    """Return the store of the ranks that were launched together, after all have come; a store of one for one rank.

    Raises RankError when MASTER_ADDR and MASTER_PORT do not say where rank 0 is, or ranks do not come within *timeout*.
    """
    if launch.world_size == 1:
        return dist.HashStore()
    address, port = _master(launch)
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = dist.TCPStore(
            address,
            port,
            launch.world_size,
            is_master=launch.rank == 0 and not of_agent,
            timeout=timeout,
            multi_tenant=True,
        )
        return dist.PrefixStore(attempt(store, launch.rank, launch.world_size, timeout), store) if of_agent else store
    except (dist.DistStoreError, dist.DistNetworkError, TimeoutError) as error:
        raise RankError(
            f"rank {launch.rank} of {launch.world_size} ({launch.told}) did not find the others at {address}:{port} "
            f"within {timeout}: {str(error).splitlines()[0]}; look at their logs, or, {ALONE}"
        ) from error


def _master(launch: Launch) -> tuple[str, int]:
    address, given = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    port = whole_number(given, _LAST_PORT)
    if not address or not port:  # 0 would be another port on every rank
        raise RankError(
            f"this process is rank {launch.rank} of {launch.world_size} ({launch.told}), but MASTER_ADDR is "
            f"{address!r} and MASTER_PORT {shown(given or None)}, which say where rank 0 is; set both, the same for "
            f"all ranks, the port from 1 to {_LAST_PORT}. In a job script of Slurm: export "
            'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | '
            f"head -n 1) MASTER_PORT=29500. Or, {ALONE}"
        )
    return address, port


def attempt(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """Return the name on which the ranks that run now agree, in a *store* that may hold what earlier ones wrote.

    Rank 0 makes up a name; the others read it and count themselves under it, and when all have, rank 0 says so. A rank
    that is one too many, or waits in vain, has read the name of an earlier attempt, and reads again. Raises
    DistStoreError when ranks do not come within *timeout*.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    if rank == 0:
        name = uuid.uuid4().hex
        store.set(_NAME, name)
        if not wait_until(lambda: store.add(f"{name}/came", 0) >= world_size - 1, timeout, ranks=world_size):
            absent = [other for other in range(1, world_size) if not store.check([f"{name}/{other}"])]
            raise dist.DistStoreError(f"ranks {absent} did not come")
        store.set(f"{name}/all", "")
        return name
    places: dict[str, int] = {}  # by name: the how-manieth this rank was
    while time.monotonic() < deadline:
        if wait_until(lambda: store.check([_NAME]), _LOOK_AGAIN, ranks=world_size):
            name = store.get(_NAME).decode()
            if name not in places:
                places[name] = store.add(f"{name}/came", 1)
            if places[name] < world_size:
                if _all_came(store, name, world_size):
                    return name
                store.set(f"{name}/{rank}", "")  # for the error of rank 0, if others never come
            time.sleep(0.05)  # all others of an earlier attempt; rank 0 of this one is yet to come
    raise dist.DistStoreError(f"rank 0 did not come within {timeout}")


def _all_came(store: dist.Store, name: str, world_size: int) -> bool:
    return wait_until(lambda: store.check([f"{name}/all"]), _LOOK_AGAIN, ranks=world_size)
