"""What a process still holds of fifty setups that were built, trained a step with and dropped.

Two ranks; each setup shards a tiny Llama over tensor-parallel ranks, takes an optimizer step and is dropped. Threads,
descriptors and resident memory of the worst rank after fifty more setups, against those after the first ten.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from figures import Figure
from ranks import on_ranks

from nemo_dist import DistributedSetup, FSDP2Config, ParallelismSizes
from nemo_dist.testing.tiny_models import SPECIMENS

TITLE = "Fifty setups with a model, built, stepped and dropped on 2 ranks"
WORLD = 2
_FIRST, _MORE = 10, 50
_HELD = {"threads": "", "descriptors": "", "resident memory": "MiB"}


def measure() -> Iterator[Figure]:
    """Yield what the ranks hold after all setups, against what they held after the first ones."""
    found = on_ranks(WORLD, build_many)
    for what, unit in _HELD.items():
        before, after = (max(rank[index][what] for rank in found) for index in range(2))
        limit = 1.0 if not unit else None
        yield Figure(what=what, unit=unit, ours=[after], peer=[before], against=f"after {_FIRST}", limit=limit)


def build_many() -> tuple[dict[str, float], dict[str, float]]:
    """Run on every rank: return what it holds after the first setups and after all."""
    for _ in range(_FIRST):
        _build()
    before = _held()
    for _ in range(_MORE):
        _build()
    return before, _held()


def _build() -> None:
    setup = DistributedSetup.build(strategy=FSDP2Config(), parallelism_sizes=ParallelismSizes(tp_size=2))
    specimen = SPECIMENS["llama"]
    model = specimen.load.from_config(specimen.config(), distributed_setup=setup, dtype=torch.float32)
    runtime = setup.runtime(model)
    optimizer = runtime.optimizer(torch.optim.AdamW)
    runtime.forward_backward(specimen.batch(2, 16, torch.Generator().manual_seed(0)))
    runtime.clip_grad_norm_(1.0)
    optimizer.step()


def _held() -> dict[str, float]:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "threads": len(os.listdir("/proc/self/task")),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "resident memory": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
    }
