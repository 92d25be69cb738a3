"""The fault campaign loses nothing: a few trials of each fault by default, and many with ``make matrix``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cases import cases, slow

CAMPAIGN = Path(__file__).parent.parent / "benchmarks" / "faults.py"


def campaign(*arguments):
    return subprocess.run(
        [sys.executable, CAMPAIGN, *arguments], capture_output=True, text=True, timeout=3000, env=dict(os.environ)
    )


@cases(
    ("count", "names"),
    [
        slow(1, ["rivals", "manifests", "flips"]),
        slow(20, ["disks"]),
        slow(100, ["kills"]),
        slow(1000, ["manifests"]),
        slow(300, ["flips", "flat"]),
        slow(100, ["disks", "rivals"]),
    ],
    lambda count, names: f"{count} of {', '.join(names)}",
)
@pytest.mark.timeout(3000)
def test_nothing_is_lost(count, names):
    done = campaign("--count", str(count), *names)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("nothing lost\n")


def test_an_unknown_fault_is_refused():
    done = campaign("earthquakes")
    assert done.returncode == 2
    assert "there is no fault earthquakes" in done.stderr
