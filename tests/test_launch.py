"""Starting ranks on one machine: exit codes, who is blamed, and that nothing is left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cases import slow

from nemo_dist.launcher import worker
from nemo_dist.launcher.launch import Failure, _failures, launch

PROGRAM = """
import os, signal, sys, time
from pathlib import Path
import torch.distributed as dist

what, folder = sys.argv[1], Path(sys.argv[2])
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
(folder / f"{rank}.partial").write_text(str(os.getpid()))
(folder / f"{rank}.partial").rename(folder / f"{rank}.pid")
if what != "sleep":
    dist.init_process_group("gloo")
    dist.barrier()
if what == "finish":
    (folder / f"{rank}.done").write_text(f"{rank}/{size} {os.environ['LOCAL_RANK']}")
    dist.destroy_process_group()
elif what == "raise":
    if rank == 1:
        raise ValueError("the second rank is unwell")
    dist.barrier()
elif what == "refuse":
    from nemo_dist.errors import TopologyError
    if rank == 1:
        raise TopologyError(["tp 3 does not divide 4 heads"])
    dist.barrier()
elif what == "kill":
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
elif what == "exit":
    sys.exit(5 if rank == 1 else 0)
else:
    print("waiting", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], int]:
    """Launch the program above on two ranks, here."""
    (tmp_path / "launched_program.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    return lambda what: launch("launched_program", [what, str(tmp_path)], nproc=2)


def pids(folder: Path, count: int, seconds: float = 240.0) -> list[int]:
    """Wait until *count* ranks have said who they are."""
    deadline = time.monotonic() + seconds
    while len(files := list(folder.glob("*.pid"))) < count:
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.05)
    return [int(file.read_text()) for file in files]


def gone(processes: list[int], seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_every_rank_runs_the_module_and_the_launch_returns_zero(
    program: Callable[[str], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = dict(os.environ)
    assert program("finish") == 0
    assert [(tmp_path / f"{rank}.done").read_text() for rank in (0, 1)] == ["0/2 0", "1/2 1"]
    assert capsys.readouterr().err == ""
    assert dict(os.environ) == before


def test_a_failing_rank_ends_all_and_only_its_traceback_is_shown(
    program: Callable[[str], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program("raise") == 1
    said = capsys.readouterr().err
    assert said.endswith("rank 1 of 2 failed: ValueError: the second rank is unwell\nall ranks were stopped\n")
    assert said.count("Traceback") == 1 and "launched_program.py" in said and "runpy" not in said
    assert gone(pids(tmp_path, 2))


@pytest.mark.slow
def test_a_refusal_has_no_traceback_and_exits_with_two(
    program: Callable[[str], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert program("refuse") == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.startswith("rank 1 of 2 failed: ") and "tp 3 does not divide 4 heads" in said


def test_a_killed_rank_is_blamed_and_not_the_peer_that_lost_it(
    program: Callable[[str], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program("kill") == 1
    assert "rank 1 of 2 was killed by SIGKILL\nall ranks were stopped\n" in capsys.readouterr().err
    assert gone(pids(tmp_path, 2))


@pytest.mark.slow
def test_a_rank_that_exits_with_a_code_passes_it_on(
    program: Callable[[str], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert program("exit") == 5
    assert "rank 1 of 2 exited with code 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), slow(signal.SIGINT, 130), slow(signal.SIGKILL, -signal.SIGKILL)]
)
def test_stopping_the_launcher_stops_every_rank_at_once(tmp_path: Path, number: signal.Signals, code: int) -> None:
    (tmp_path / "launched_program.py").write_text(PROGRAM)
    launched = "launch('launched_program', sys.argv[1:], 2)"
    start = f"import sys; from nemo_dist.launcher.launch import launch; sys.exit({launched})"
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    environment = os.environ | {"PYTHONPATH": path, "TMPDIR": str(tmp_path)}  # one that is killed leaves its folder
    launcher = subprocess.Popen(
        [sys.executable, "-c", start, "sleep", str(tmp_path)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    ranks = pids(tmp_path, 2)
    launcher.send_signal(number)
    _, said = launcher.communicate(timeout=240)
    assert launcher.returncode == code
    assert gone(ranks)
    assert said == ("" if number == signal.SIGKILL else f"stopped by {number.name}: all 2 ranks have ended\n")


def test_failures_are_ordered_from_cause_to_consequence() -> None:
    lost = Failure(rank=0, error="RuntimeError: Connection closed by peer", at=1.0)
    raised = Failure(rank=1, error="ValueError: no", at=2.0)
    later = Failure(rank=2, error="ValueError: no", at=3.0)
    killed = Failure(rank=3, error="was killed by SIGKILL", code=-signal.SIGKILL)
    stopped = Failure(rank=4, error="was killed by SIGTERM", code=-signal.SIGTERM)
    found = sorted([stopped, lost, killed, later, raised], key=lambda failure: failure.order)
    assert [failure.rank for failure in found] == [1, 2, 3, 0, 4]


def test_a_record_that_was_cut_short_counts_as_none(tmp_path: Path) -> None:
    """A rank is killed while it writes, or the disk is full: the rank that failed first is named all the same."""
    (tmp_path / "rank0.json").write_text("")
    (tmp_path / "rank1.json").write_text('{"error": "ValueError: the cause", "traceback": "", "code": 1, "at": 5.0}')
    (tmp_path / "rank2.json").write_text('{"error": ')
    (tmp_path / "rank3.json").write_text("[]")

    found = {failure.rank: failure for failure in _failures(tmp_path, {0: -signal.SIGKILL, 1: 1, 2: 1, 3: 1})}

    assert found[0].error == "was killed by SIGKILL" and found[2].error == found[3].error == "exited with code 1"
    assert min(found.values(), key=lambda failure: failure.order).error == "ValueError: the cause"


def test_a_rank_that_is_killed_while_it_records_its_error_leaves_no_half_of_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def killed(path: Path, text: str) -> None:
        path.touch()
        raise Killed

    monkeypatch.setenv(worker.FOLDER, str(tmp_path))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(Path, "write_text", killed)
    with pytest.raises(Killed):
        worker._end("an error", "", 1)
    assert not list(tmp_path.glob("rank*.json"))
