"""What a test session puts into the temporary folder does not stay there."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from nemo_dist.testing.pool import RankPool

MAKE = """
import os, signal
from nemo_dist.testing.temp_folders import scratch
(scratch("one") / "file").touch()
scratch("two")
"""


def run(folder, code):
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"TMPDIR": str(folder)}, timeout=240
    ).returncode


def test_the_folders_of_a_process_are_removed_when_it_ends(tmp_path):
    assert run(tmp_path, f"{MAKE}\nassert len(os.listdir(scratch('three').parent)) == 3") == 0
    assert list(tmp_path.iterdir()) == []


def test_the_folders_of_a_failed_process_are_removed_too(tmp_path):
    assert run(tmp_path, f"{MAKE}\nraise ValueError") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_folders_of_a_killed_process_are_removed_by_the_next_one(tmp_path):
    assert run(tmp_path, f"{MAKE}\nos.kill(os.getpid(), signal.SIGKILL)") < 0
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("nemo_dist_test_")
    living = tmp_path / f"nemo_dist_test_{os.getpid()}_x"
    for other in (living, tmp_path / "nemo_dist_test_notes"):
        other.mkdir()
    assert run(tmp_path, MAKE) == 0
    assert sorted(tmp_path.iterdir()) == sorted([living, tmp_path / "nemo_dist_test_notes"])


def on_rank_make_folder():
    return tempfile.mkdtemp(prefix="torchelastic_")


def test_the_folders_of_ranks_are_removed_with_their_pool():
    with RankPool(1) as pool:
        (made,) = pool.run(on_rank_make_folder)
        assert Path(made).is_dir()
    assert not Path(made).exists()
