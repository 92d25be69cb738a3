"""Try what can happen to a run and its files, and count: ``python benchmarks/faults.py [--count N] [NAME ...]``.

Each fault is tried many times, at moments and places that ``--seed`` determines. It must be survived, or refused by a
CheckpointError or RankError, and nothing that was saved may be lost: the last columns say so, or what was lost. The
exit code is 1 when anything was.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
# torch keeps the last 2,000 collectives of a process, some 1 KB each, and so grows until there are as many.
os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "50")

KINDS = {
    "kills": 100,
    "disks": 100,
    "reads": 100,
    "rivals": 20,
    "manifests": 1000,
    "headers": 300,
    "flips": 300,
    "flat": 300,
}


def main() -> int:
    """Run the kinds of faults that were asked for, all by default."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(KINDS)} (default: all)")
    parser.add_argument("--count", type=int, metavar="N", help=f"how many trials of each (default: {KINDS})")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(KINDS)):
        parser.error(f"there is no fault {', '.join(unknown)} (there are: {', '.join(KINDS)})")
    print(f"seed {options.seed}")
    lost = 0
    with tempfile.TemporaryDirectory(prefix="nemo_dist_faults_") as folder:
        for name in options.names or KINDS:
            lost += run(name, options.count or KINDS[name], options.seed, Path(folder) / name)
    print(f"LOST: {lost}" if lost else "nothing lost")
    return int(lost > 0)


def run(name: str, count: int, seed: int, folder: Path) -> int:
    """Run one kind of fault; print a line for each row, and what was lost; return how often something was."""
    start, lost = time.monotonic(), 0
    folder.mkdir()
    for tally in import_module(f"campaign.{name}").run(count, random.Random(f"{seed} {name}"), folder):
        print(tally, flush=True)
        for what in tally.lost[:5]:
            print("    LOST:", what.strip().replace("\n", "\n    "))
        lost += len(tally.lost)
    print(f"{name}: {time.monotonic() - start:.0f} s")
    return lost


if __name__ == "__main__":
    sys.exit(main())
