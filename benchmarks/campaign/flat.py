"""Save, load and set up many times in one process: memory, objects, threads and descriptors stay flat."""

from __future__ import annotations

import ctypes
import gc
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from campaign.forks import call
from campaign.tally import Tally
from campaign.tiny_run import TinyRun
from nemo_dist import RunFolder
from nemo_dist.testing.live_objects import grown as grown_objects
from nemo_dist.testing.live_objects import live_objects

_WARM = 30  # first ones, which fill caches
_SLACK = 1.0  # MiB in use that may stay of all; what the process has besides are holes, which malloc_trim gives back


def run(count: int, chance: Random, folder: Path) -> Iterator[Tally]:
    """Yield the counts for one and two ranks."""
    for world in (1, 2):
        for name, work in (("saves and loads", save_and_load), ("setups", set_up)):
            tallies = call(world, on_rank_repeat, f"{name}, {world} ranks", work, count, folder / f"{name}-{world}")
            yield max(tallies, key=lambda tally: len(tally.lost))


def save_and_load(run: TinyRun, folder: Path, index: int) -> None:
    """Save a step, every other one in the background, and load it."""
    run.step = index
    run.save(RunFolder(folder, keep_last=2), asynchronous=index % 2 == 0)
    run.resume(RunFolder(folder, keep_last=2))


def set_up(run: TinyRun, folder: Path, index: int) -> None:
    """Make a new setup, model, runtime and optimizer, and take a step."""
    TinyRun().train()


def on_rank_repeat(
    tell: Callable[..., None], name: str, work: Callable[[TinyRun, Path, int], None], count: int, folder: Path
) -> Tally:
    """Repeat *work*, and compare what the process holds after the first ones and at the end."""
    warnings.simplefilter("ignore")
    tally, run = Tally(name), TinyRun()
    run.train()
    for index in range(1, _WARM + 1):
        work(run, folder, index)
    before, objects = holds(), live_objects()
    for index in range(_WARM + 1, _WARM + 1 + count):
        work(run, folder, index)
        tally.survive()
    after = holds()
    grown = {what: after[what] - value for what, value in before.items()}
    tally.remark = ", ".join(f"{what} {before[what]:.1f} -> {after[what]:.1f}" for what in before)
    if grown["threads"] > 0 or grown["descriptors"] > 0 or grown["MiB in use"] > _SLACK:
        tally.lose(f"it grew: {grown}")
    if more := grown_objects(objects, live_objects()):
        tally.lose(f"there are more of {more}")
    return tally


_MALLINFO = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class _Malloc(ctypes.Structure):
    """``struct mallinfo2`` of glibc."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in _MALLINFO)


def holds() -> dict[str, float]:
    """Return what this process holds: memory that is in use, without the holes between, and all that it has."""
    gc.collect()
    call = ctypes.CDLL(None).mallinfo2
    call.restype = _Malloc
    found = call()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "MiB in use": (found.uordblks + found.hblkhd) / 2**20,
        "MiB": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        "threads": len(os.listdir("/proc/self/task")),
        "descriptors": len(os.listdir("/proc/self/fd")),
    }
