"""Whatever a run dies of while it saves, a complete checkpoint is found and goes on; nothing is ever loaded half."""

import os
import random
import signal
import subprocess
import threading
import time
from contextlib import contextmanager

import checkpoint_runs as runs
import pytest
import torch

from nemo_dist import RunFolder
from nemo_dist.testing.failure_report import RankFailure
from nemo_dist.testing.pool import RankPool


def set_state(runtime, optimizer, step):
    """Make every weight and moment a number of the step, so that a mix of two steps would show."""
    with torch.no_grad():
        for parameter in runtime.model.parameters():
            parameter.fill_(step)
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step)),
                "exp_avg": torch.full_like(parameter, 10 + step),
                "exp_avg_sq": torch.full_like(parameter, 100 + step),
            }


def assert_state_of(runtime, optimizer, step):
    for parameter in runtime.model.parameters():
        state = optimizer.state[parameter]
        for tensor, value in ((parameter, step), (state["exp_avg"], 10 + step), (state["exp_avg_sq"], 100 + step)):
            assert (tensor.to_local() == value).all(), f"expected the state of step {step}"
        assert state["step"].item() == step


def on_rank_resume(folders, path):
    """Go on from *path*, check that what was loaded is whole, and save one step more."""
    runs.FOLDERS.update(folders)
    runtime, optimizer = runs.start("fsdp2")
    folder = RunFolder(path, keep_last=2)
    found = folder.resume(runtime, optimizer)
    if found is None:
        return None
    step, extra = found
    assert extra == {"step": step}
    assert_state_of(runtime, optimizer, step)
    set_state(runtime, optimizer, step + 1)
    folder.save(runtime, optimizer, step=step + 1, extra={"step": step + 1})
    return step


def on_rank_save_until_killed(folders, path, pids, first):
    """Save one step after the other, in the foreground and in the background by turns, until killed."""
    (pids / str(os.getpid())).touch()
    runs.FOLDERS.update(folders)
    runtime, optimizer = runs.start("fsdp2")
    folder = RunFolder(path, keep_last=2)
    for step in range(first, first + 10_000):
        set_state(runtime, optimizer, step)
        folder.save(runtime, optimizer, step=step, extra={"step": step}, asynchronous=step % 2 == 0)
        (pids / f"saved-{step}").touch()


def saved_steps(pids):
    """Return the steps whose save has returned; a rank that is killed while it says so has said it or not."""
    return sorted(int(entry.name.removeprefix("saved-")) for entry in pids.glob("saved-*"))


def kill_while_saving(pool, folders, path, pids, first, delay, everybody):
    """Let the ranks save until *delay* seconds after the first save, then kill one or all."""

    def kill():
        deadline = time.monotonic() + 240
        while not saved_steps(pids) and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(delay)
        victims = sorted(int(entry.name) for entry in pids.iterdir() if not entry.name.startswith("saved-"))
        for pid in victims if everybody else victims[-1:]:
            os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(RankFailure):
        pool.run(on_rank_save_until_killed, folders, path, pids, first, timeout=300.0)
    killer.join()


@pytest.mark.parametrize("moments", [2, pytest.param(30, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_a_run_killed_while_saving_resumes_from_a_complete_checkpoint(tmp_path, moments):
    chance, folders, path = random.Random(moments), runs.folders("llama"), tmp_path / "run"
    first = 1
    with RankPool(2) as pool:
        for index in range(moments):
            pids = tmp_path / f"pids-{index}"
            pids.mkdir()
            kill_while_saving(pool, folders, path, pids, first, chance.uniform(0, 0.4), everybody=index % 2 == 0)
            steps = pool.run(on_rank_resume, folders, path)
            # What a save in the foreground returned from is durable; of one in the background, the one before is.
            returned = saved_steps(pids)[-1]
            assert steps[0] == steps[1] >= (returned if returned % 2 else returned - 1)
            first = steps[0] + 2
    assert len(list(path.glob("step-*"))) <= 3


CALLS = ("mkdir", "rename", "open", "fsync", "rmdir", "unlink")


def on_rank_die_at_call(folders, path, number):
    """Save step 2 over the folder with step 1, and step 2 again, but die at the *number*-th change of the disk."""
    runs.FOLDERS.update(folders)
    runtime, optimizer = runs.start("fsdp2")
    folder = RunFolder(path, keep_last=1)
    count = 0

    def counting(call):
        def wrapped(*args, **kwargs):
            nonlocal count
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return call(*args, **kwargs)

        return wrapped

    set_state(runtime, optimizer, 2)
    if runtime.dp_rank == 0:
        for name in CALLS:
            setattr(os, name, counting(getattr(os, name)))
    folder.save(runtime, optimizer, step=2, extra={"step": 2})
    folder.save(runtime, optimizer, step=2, extra={"step": 2})
    return count


def on_rank_save_first(folders, path):
    runs.FOLDERS.update(folders)
    runtime, optimizer = runs.start("fsdp2")
    set_state(runtime, optimizer, 1)
    RunFolder(path).save(runtime, optimizer, step=1, extra={"step": 1})


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_rank_may_die_at_every_disk_operation_of_a_save(tmp_path):
    """Every system call that changes the disk is a moment to die at, also in the middle of replacing a checkpoint."""
    folders, seen, number = runs.folders("llama"), set(), 0
    with RankPool(1) as pool:
        while True:
            path = tmp_path / str(number)
            pool.run(on_rank_save_first, folders, path)
            try:
                pool.run(on_rank_die_at_call, folders, path, number)
            except RankFailure:
                seen.add(pool.run(on_rank_resume, folders, path)[0])
                number += 1
                continue
            break
    assert number > 20
    assert seen == {1, 2}


@contextmanager
def small_disk(folder, options):
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this user may not mount a small disk: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def on_rank_save_until_the_disk_is_full(folders, path, asynchronous):
    """Save step 1, then steps that cannot be saved, and train on; report the errors and what is loaded in the end."""
    runs.FOLDERS.update(folders)
    runtime, optimizer = runs.start("fsdp2")
    folder = RunFolder(path)
    errors = []
    for step in range(1, 9):
        set_state(runtime, optimizer, step)
        try:
            folder.save(runtime, optimizer, step=step, extra={"step": step}, asynchronous=asynchronous).wait()
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
            break
    loss = runs.steps(runtime, optimizer, runs.Task(), range(1))
    found, _ = folder.resume(runtime, optimizer)
    assert_state_of(runtime, optimizer, found)
    return errors, found, step, loss


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_is_an_error_and_keeps_the_older_checkpoint(ranks, tmp_path, asynchronous):
    with small_disk(tmp_path / "disk", "size=900k") as disk:
        answers = ranks(2).run(on_rank_save_until_the_disk_is_full, runs.folders("llama"), disk / "run", asynchronous)
        errors = "\n".join(error for errors, _, _, _ in answers for error in errors)
        assert "No space left on device" in errors
        assert errors.count("Error: ") >= 2, "an error on one rank must be one on all"
        assert all(found == failed - 1 for _, found, failed, _ in answers)


def on_rank_save_to_a_read_only_disk(folders, path, mount):
    runs.FOLDERS.update(folders)
    runtime, optimizer = runs.start("fsdp2")
    folder = RunFolder(path)
    set_state(runtime, optimizer, 1)
    folder.save(runtime, optimizer, step=1, extra={"step": 1})
    if runtime.dp_rank == 0:  # once more over itself, as the first mount has open files
        subprocess.run(["mount", "--bind", str(mount), str(mount)], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", str(mount)], check=True)
    set_state(runtime, optimizer, 2)
    with pytest.raises(Exception, match="Read-only file system"):
        folder.save(runtime, optimizer, step=2, extra={"step": 2})
    step, _ = folder.resume(runtime, optimizer)
    assert_state_of(runtime, optimizer, step)
    return step


def test_a_read_only_disk_is_an_error_and_keeps_the_older_checkpoint(ranks, tmp_path):
    with small_disk(tmp_path / "disk", "size=10m") as disk:
        assert ranks(2).run(on_rank_save_to_a_read_only_disk, runs.folders("llama"), disk / "run", disk) == [1, 1]
        subprocess.run(["umount", str(disk)], check=True)


def on_rank_fail_in_the_background(folders, path):
    """Let rank 1 write no file above 2000 bytes."""
    import resource

    runs.FOLDERS.update(folders)
    runtime, optimizer = runs.start("fsdp2")
    runtime.save(path, optimizer)
    if runtime.dp_rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    handle = runtime.save(path, optimizer, asynchronous=True)
    handle._thread.join()
    if runtime.dp_rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    try:
        runtime.load(path, optimizer)
    except Exception as error:
        first = f"{type(error).__name__}: {error}"
    runtime.load(path, optimizer)
    return first


def test_a_background_error_is_raised_once_by_the_next_call_on_each_rank(ranks, tmp_path):
    first, second = ranks(2).run(on_rank_fail_in_the_background, runs.folders("llama"), tmp_path / "c")
    assert first.startswith("RankError: ") and "rank 1: CheckpointError" in first
    assert second.startswith("CheckpointError: writing the checkpoint to") and "File too large" in second


EXIT = """
import os, sys
from nemo_dist.checkpoint import async_save
def work():
    raise OSError("the disk is gone")
async_save.begin(work)
"""


def test_an_unawaited_background_error_makes_the_process_fail():
    import sys

    done = subprocess.run([sys.executable, "-c", EXIT], capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert "an asynchronous save failed" in done.stderr
    assert "the disk is gone" in done.stderr
