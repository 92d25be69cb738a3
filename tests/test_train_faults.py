"""What a run of a recipe does when the disk of its numbers, its tokenizer or its launcher fails."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager

import pytest
from test_checkpoint_crash import small_disk
from test_train import CHAT, QUIET, ROOT, command, example, into, lines, numbers
from typer.testing import CliRunner

from nemo_dist import RunFolder
from nemo_dist.checkpoint.manifest import Manifest
from nemo_dist.cli.main import app
from nemo_dist.launcher.launch import _failures
from nemo_dist.recipe.config import LoggingSection, Recipe
from nemo_dist.recipe.job import train
from nemo_dist.recipe.metrics import FILE, Metrics
from nemo_dist.recipe.progress import progress

SHORT = (*QUIET, "training.steps=1", "evaluate.every=null")


@contextmanager
def files_up_to(size):
    """Let no file of this process grow above *size* bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_numbers_that_a_full_disk_does_not_take_are_a_warning_and_written_later(tmp_path):
    metrics = Metrics.open(LoggingSection(), tmp_path, 0, {})
    metrics.write(1, {"loss": 3.0})
    before = (tmp_path / FILE).read_bytes()
    for step, loss in ((2, 2.0), (3, 1.0)):
        with (
            files_up_to(len(before) + 9),
            pytest.warns(UserWarning, match=rf"the run cannot be written.*File too large: '.*{FILE}'"),
        ):
            metrics.write(step, {"loss": loss})
    assert (tmp_path / FILE).read_bytes() == before
    metrics.write(4, {"loss": 0.5})
    assert numbers(tmp_path, "loss") == {(1, "loss"): 3.0, (2, "loss"): 2.0, (3, "loss"): 1.0, (4, "loss"): 0.5}


def test_numbers_of_earlier_steps_outlive_a_full_disk_at_the_start(tmp_path):
    (tmp_path / FILE).write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 5)))
    with files_up_to(9), pytest.raises(OSError, match="File too large"):
        Metrics.open(LoggingSection(), tmp_path, 3, {})
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]


def test_numbers_with_junk_in_them_are_read(tmp_path):
    (tmp_path / FILE).write_bytes(b'{"step": 1}\n\0\0\xff\xfe\n[1]\n{"step": 2}\n')
    Metrics.open(LoggingSection(), tmp_path, 2, {})
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def on_rank_fail(recipe, broken):
    """Return the error of a run in which writing tokenizers or saving fails, as on a full disk."""

    def full(*_, **__):
        raise Exception("No space left on device (os error 28)")  # as the tokenizers library says it

    with pytest.MonkeyPatch.context() as patch:
        if broken:
            patch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", full)
        try:
            train(Recipe.from_json(recipe))
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "none"


def test_a_folder_for_numbers_that_is_a_file_is_refused_on_all_ranks(on_ranks, tmp_path):
    (tmp_path / "logs").write_text("mine")
    recipe = example("sft", *SHORT, *into(tmp_path / "run"), f"logging.folder={tmp_path / 'logs'}").to_json()
    first, second = on_ranks(2, on_rank_fail, recipe, False)
    said = f"opening the numbers of the run in {tmp_path / 'logs'} failed: [Errno 17] File exists"
    assert first.startswith(f"CheckpointError: {said}")
    assert second.startswith("RankError: ") and said in second


def test_a_folder_for_checkpoints_that_cannot_be_written_is_refused_before_a_step(on_ranks, tmp_path):
    (tmp_path / "run").write_text("mine")
    recipe = example("sft", *SHORT, *into(tmp_path / "run"), f"logging.folder={tmp_path / 'logs'}").to_json()
    first, second = on_ranks(2, on_rank_fail, recipe, False)
    said = f"trying to write to {tmp_path / 'run'} failed: [Errno 17] File exists"
    assert first.startswith(f"CheckpointError: {said}")
    assert second.startswith("RankError: ") and said in second
    assert not (tmp_path / "logs").exists()


def test_a_tokenizer_that_a_full_disk_does_not_take_is_refused_on_all_ranks(on_ranks, tmp_path):
    first, second = on_ranks(2, on_rank_fail, example("sft", *SHORT, *into(tmp_path)).to_json(), True)
    said = f"writing {tmp_path / 'exported'} failed: Exception: No space left on device"
    assert first.startswith(f"CheckpointError: {said}")
    assert second.startswith("RankError: ") and said in second


def test_a_log_on_a_full_disk_does_not_end_a_run(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with progress(2, 0, 1, shown=True) as report:
            report(1, {"loss": 3.0})
            report(2, {"loss": 2.0})
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # closing it flushes what it has left


@pytest.mark.slow
@pytest.mark.parametrize("what", ["full", "read-only"])
def test_a_run_on_a_disk_that_fails_ends_in_words_and_goes_on_when_it_is_well(tmp_path, what):
    """The disk has room for two checkpoints of the four; or it becomes read-only after the first."""
    with small_disk(tmp_path / "disk", "size=3300k" if what == "full" else "size=20m") as disk:
        asked = [*into(disk / "run"), "checkpoint.every=1", "checkpoint.keep_last=null", "training.steps=4"]
        arguments = ["docs/examples/sft.yaml", "--nproc", 2, *(word for one in asked for word in ("--set", one))]
        process = command(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if what == "read-only":
            until(lambda: RunFolder(disk / "run").latest(), process)
            subprocess.run(["mount", "--bind", disk, disk], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", disk], check=True)
        said = process.communicate(timeout=240)[1]
        assert process.returncode == 2, said
        assert "Traceback" not in said and str(disk / "run") in said
        assert {"full": "No space left on device", "read-only": "Read-only file system"}[what] in said
        newest = Manifest.read(RunFolder(disk / "run").latest())
        for index in range(len(newest.files)):
            newest.verify(index)
        subprocess.run(
            ["umount", disk] if what == "read-only" else ["mount", "-o", "remount,size=20m", disk], check=True
        )
        again = command(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        told, said = again.communicate(timeout=240)
        assert again.returncode == 0, said
        assert f"goes on after step {newest.about['step']} of" in told
        assert sorted(step for step, _ in numbers(disk / "run", "loss")) == [1, 2, 3, 4]


def until(condition, process):
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)


# ---- the launcher ----


def test_a_rank_whose_record_does_not_fit_on_the_disk_ends_with_its_code_and_words(tmp_path):
    end = "from nemo_dist.launcher.worker import _end; _end('TopologyError: no', '', 2)"
    environment = os.environ | {"NEMO_DIST_FAILURES": str(tmp_path / "gone"), "RANK": "0"}
    ended = subprocess.run([sys.executable, "-c", end], env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (2, "TopologyError: no\n")


def test_a_rank_whose_log_is_on_a_full_disk_succeeds_all_the_same(tmp_path):
    (tmp_path / "says.py").write_text("print('much')")
    environment = os.environ | {"NEMO_DIST_LAUNCHER": str(os.getpid()), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("PYTHONUNBUFFERED", None)  # then it is the program that fails
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "nemo_dist.launcher.worker", "says"]
        ended = subprocess.run(command, env=environment, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_machine_without_room_for_temporary_files_is_told_in_words(monkeypatch):
    monkeypatch.setattr(tempfile, "TemporaryDirectory", full_folder)
    arguments = ["train", str(ROOT / "docs/examples/sft.yaml"), "--nproc", "2", "--set", f"data.path={CHAT}"]
    result = CliRunner().invoke(app, [*arguments, "--set", "evaluate=null"])
    assert (result.exit_code, result.stderr) == (2, "error: [Errno 28] No space left on device\n")


def full_folder(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_half_a_record_of_a_rank_is_left_out(tmp_path):
    (tmp_path / "rank1.json").write_text('{"error": "no", "tra')
    (failure,) = _failures(tmp_path, {1: 2})
    assert failure.error == "exited with code 2"
