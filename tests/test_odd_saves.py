"""Saves and loads at odd paths and moments: from two threads, into links, while a script changes its folder."""

import errno
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import checkpoint_runs as runs
import pytest
import torch.distributed as dist

from nemo_dist import CheckpointError, RunFolder, initialize_distributed
from nemo_dist.checkpoint import async_save, atomic_dir, run_folder
from nemo_dist.checkpoint import load as load_module
from nemo_dist.checkpoint import save as save_module
from nemo_dist.checkpoint.atomic_dir import Staging
from nemo_dist.checkpoint.folder_lock import claim, locked
from nemo_dist.checkpoint.manifest import Manifest
from nemo_dist.checkpoint.preemption import CODE


@pytest.fixture(scope="module")
def one():
    """A runtime and its optimizer after one step, in this process alone."""
    initialize_distributed("gloo")
    runs.FOLDERS.update(runs.folders("llama"))
    runtime, optimizer = runs.start("fsdp2")
    runs.steps(runtime, optimizer, runs.Task(), range(1))
    yield runtime, optimizer
    dist.destroy_process_group()


def assert_whole(path):
    manifest = Manifest.read(path)
    manifest.verify(0)
    manifest.verify_companions()


# ---- threads ----


def test_a_second_save_is_refused_until_the_first_has_ended(tmp_path):
    gate = threading.Event()
    first = async_save.begin(gate.wait)
    with pytest.raises(CheckpointError, match="another thread of this process saves just now"):
        async_save.begin(lambda: None)
    gate.set()
    first.wait()
    async_save.begin(lambda: None).wait()


def test_a_folder_is_written_by_one_thread_at_a_time(tmp_path):
    lock = tmp_path / ".c.lock"
    with locked(lock, tmp_path / "c"):
        with pytest.raises(CheckpointError, match="another thread of this process writes to"), locked(lock, tmp_path):
            pass
        assert lock.exists()
    with locked(lock, tmp_path / "c"):
        pass


def test_a_child_of_the_process_that_has_a_folder_is_another_run(tmp_path):
    claim(tmp_path / ".lock", tmp_path)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            claim(tmp_path / ".lock", tmp_path)
            os.write(writing, b"claimed")
        except CheckpointError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert "another run writes to" in os.read(reading, 1000).decode()
    claim(tmp_path / ".lock", tmp_path)


def test_threads_that_save_to_one_path_leave_a_whole_checkpoint(one, tmp_path):
    runtime, optimizer = one
    saved, wrong = [], []

    def save(number):
        try:
            runtime.save(tmp_path / "c", optimizer, extra=number)
            saved.append(number)
        except CheckpointError:
            pass
        except BaseException as error:
            wrong.append(error)

    for turn in range(10):
        threads = [threading.Thread(target=save, args=(2 * turn + index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert_whole(tmp_path / "c")
        assert Manifest.read(tmp_path / "c").about["extra"] in saved[-2:]
    assert not wrong
    assert os.listdir(tmp_path) == ["c"]


# ---- paths ----


def test_a_script_may_change_its_folder_while_a_save_is_under_way(one, tmp_path, monkeypatch):
    runtime, optimizer = one
    gate, write = threading.Event(), save_module.write_folder
    monkeypatch.setattr(save_module, "write_folder", lambda *given, **named: gate.wait() and write(*given, **named))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    under_way = runtime.save("c", optimizer, asynchronous=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    gate.set()
    under_way.wait()
    assert_whole(tmp_path / "c")


@pytest.mark.parametrize("path", ["a\0b", "~nobody-of-this-name/c", "/", "\ud800"])
def test_what_names_no_folder_is_refused_by_all_in_words(one, path):
    runtime, _ = one
    for call in (runtime.save, runtime.load, runtime.export, RunFolder):
        with pytest.raises(CheckpointError, match=r"is no path|is the root of all folders"):
            call(path)


def test_a_home_folder_is_found_by_saves_and_loads(one, tmp_path, monkeypatch):
    runtime, optimizer = one
    monkeypatch.setenv("HOME", str(tmp_path))
    runtime.save("~/c", optimizer, extra=3)
    assert (tmp_path / "c").is_dir()
    assert runtime.load("~/c", optimizer) == 3


@pytest.mark.parametrize("what", ["save", "export"])
def test_the_folder_in_which_the_process_works_is_not_replaced(one, tmp_path, monkeypatch, what):
    runtime, _ = one
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(CheckpointError, match="this process works in it"):
        getattr(runtime, what)(".")
    assert os.getcwd() == str(tmp_path / "work")
    assert os.listdir(tmp_path) == ["work"]


def test_a_process_whose_folder_is_gone_saves_to_a_whole_path(one, tmp_path, monkeypatch):
    runtime, optimizer = one
    runtime.save(tmp_path / "c", optimizer)
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    runtime.save(tmp_path / "c", optimizer, extra=2)
    assert runtime.load(tmp_path / "c", optimizer) == 2


@pytest.mark.parametrize("number", [errno.EPERM, errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS], ids=errno.errorcode.get)
def test_what_lies_beside_a_checkpoint_is_copied_where_there_are_no_hard_links(one, tmp_path, monkeypatch, number):
    runtime, optimizer = one
    runtime.save(tmp_path / "c", optimizer)
    (tmp_path / "c" / "plots").mkdir()
    for name in ("notes.txt", "plots/loss.png"):
        (tmp_path / "c" / name).write_text(name)
    (tmp_path / "c" / "link").symlink_to("notes.txt")

    def refused(*given, **named):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refused)
    runtime.save(tmp_path / "c", optimizer, extra=2)
    assert [(tmp_path / "c" / name).read_text() for name in ("notes.txt", "plots/loss.png")] == [
        "notes.txt",
        "plots/loss.png",
    ]
    assert os.readlink(tmp_path / "c" / "link") == "notes.txt"
    assert Manifest.read(tmp_path / "c").about["extra"] == 2


# ---- the folder of a run ----


def test_a_job_that_must_end_saves_although_an_earlier_save_failed(one, tmp_path, monkeypatch):
    """The request stands in for that of a signal, whose grace would end this process."""
    runtime, optimizer = one
    run = RunFolder(tmp_path)
    monkeypatch.setattr(run_folder, "stop_request", SimpleNamespace(listen=lambda *given: None, name="SIGTERM"))
    with monkeypatch.context() as broken:
        broken.setattr(save_module, "write_folder", lambda *given, **named: Path("/").mkdir())
        run.save(runtime, optimizer, step=1, asynchronous=True)._thread.join()
    failed = pytest.warns(UserWarning, match=r"an earlier asynchronous save failed: .*File exists")
    with failed, pytest.raises(SystemExit) as ended:
        run.save_if_preempted(runtime, optimizer, step=2)
    assert ended.value.code == CODE
    assert run.steps() == [2]


@pytest.mark.parametrize("step", [2**63, 10**30, 10**5000], ids=["2**63", "10**30", "10**5000"])
def test_a_step_that_no_program_counts_to_is_refused(one, tmp_path, step):
    runtime, optimizer = one
    with pytest.raises(ValueError, match="step must be an int from 0 to"):
        RunFolder(tmp_path / "run").save(runtime, optimizer, step=step)
    assert not os.listdir(tmp_path)


def test_the_largest_step_is_saved_and_found(one, tmp_path):
    runtime, optimizer = one
    run = RunFolder(tmp_path)
    run.save(runtime, optimizer, step=2**63 - 1)
    assert run.resume(runtime, optimizer) == (2**63 - 1, None)


def test_a_job_that_is_killed_before_it_names_its_newest_checkpoint_goes_on_from_there(one, tmp_path):
    runtime, optimizer = one
    run = RunFolder(tmp_path)
    run.save(runtime, optimizer, step=1)
    shutil.copy2(tmp_path / "latest", tmp_path / "before")
    run.save(runtime, optimizer, step=2)
    (tmp_path / "before").rename(tmp_path / "latest")
    assert run.latest() == tmp_path / "step-00000002"
    assert run.resume(runtime, optimizer) == (2, None)


def test_a_copy_of_a_run_that_went_back_goes_on_from_where_it_went(one, tmp_path):
    """Copies have the time of copying: here all of one second, and the one to leave is the last."""
    runtime, optimizer = one
    run = RunFolder(tmp_path / "run")
    for step in (1, 9, 3):
        run.save(runtime, optimizer, step=step)
    shutil.copytree(run.path, tmp_path / "copy", copy_function=shutil.copyfile)
    os.utime(tmp_path / "copy" / "latest", (1, 1))
    copy = RunFolder(tmp_path / "copy")
    assert copy.resume(runtime, optimizer) == (3, None)
    for step in (4, 9, 10):
        copy.save(runtime, optimizer, step=step)
        assert copy.resume(runtime, optimizer) == (step, None)


LATEST = {
    "5000 digits": lambda place: place.write_text("step-" + "1" * 5000),
    "a folder": lambda place: place.mkdir(),
    "a link to nothing": lambda place: place.symlink_to("gone"),
    "a pipe": os.mkfifo,
}


@pytest.mark.parametrize("what", LATEST)
def test_a_pointer_of_no_sense_is_as_none(one, tmp_path, what):
    runtime, optimizer = one
    run = RunFolder(tmp_path)
    run.save(runtime, optimizer, step=1)
    (tmp_path / "latest").unlink()
    LATEST[what](tmp_path / "latest")
    assert run.resume(runtime, optimizer) == (1, None)


def test_a_pipe_in_the_place_of_a_file_is_no_file(one, tmp_path):
    runtime, optimizer = one
    for name in ("manifest.json", "rank-00000.safetensors", "hf/config.json"):
        place = tmp_path / name.partition("/")[0]
        runtime.save(place, optimizer)
        (place / name).unlink()
        os.mkfifo(place / name)
        with pytest.raises(CheckpointError, match="is missing"):
            runtime.load(place, optimizer)


def test_a_checkpoint_that_was_moved_to_another_disk_stays_there_when_it_is_pruned(one, tmp_path):
    runtime, optimizer = one
    run = RunFolder(tmp_path / "run", keep_last=2)
    run.save(runtime, optimizer, step=1)
    shutil.move(run.path / "step-00000001", tmp_path / "archive")
    (run.path / "step-00000001").symlink_to(tmp_path / "archive")
    for step in range(2, 5):
        run.save(runtime, optimizer, step=step)
    assert sorted(os.listdir(run.path)) == [".lock", "latest", "step-00000003", "step-00000004"]
    assert_whole(tmp_path / "archive")


def test_a_checkpoint_that_another_job_prunes_in_the_middle_of_a_load_is_loaded_whole(one, tmp_path, monkeypatch):
    runtime, optimizer = one
    runtime.save(tmp_path / "c", optimizer, extra=1)
    saved, fill = runs.digests(runs.everything(runtime, optimizer)), load_module._Run.fill
    runs.steps(runtime, optimizer, runs.Task(), range(1, 2))

    def filled_without_files(run, reader):
        shutil.rmtree(tmp_path / "c")
        fill(run, reader)

    monkeypatch.setattr(load_module._Run, "fill", filled_without_files)
    assert runtime.load(tmp_path / "c", optimizer) == 1
    assert runs.digests(runs.everything(runtime, optimizer)) == saved


def test_a_load_and_a_save_may_finish_the_same_commit(one, tmp_path, monkeypatch):
    """Between the two renames of a file system that cannot exchange folders, a load puts the new one in place."""
    runtime, optimizer = one
    runtime.save(tmp_path / "c", optimizer, extra=1)
    place = Staging._place

    def placed_by_another(staging):
        place(staging)
        place(staging)

    monkeypatch.setattr(atomic_dir, "_exchange", lambda *folders: False)
    monkeypatch.setattr(Staging, "_place", placed_by_another)
    runtime.save(tmp_path / "c", optimizer, extra=2)
    assert Manifest.read(tmp_path / "c").about["extra"] == 2
    assert os.listdir(tmp_path) == ["c"]


def test_a_checkpoint_that_cannot_be_put_in_place_is_passed_over(one, tmp_path, monkeypatch):
    """On a disk that is read-only by now, a commit that was interrupted cannot be finished."""
    runtime, optimizer = one
    run = RunFolder(tmp_path)
    run.save(runtime, optimizer, step=1)
    run.save(runtime, optimizer, step=2)
    (tmp_path / "step-00000002").rename(tmp_path / ".step-00000002.partial")
    (tmp_path / ".step-00000002.old").mkdir()

    def read_only(staging):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Staging, "_place", read_only)
    assert run.latest() == tmp_path / "step-00000001"
    with pytest.warns(UserWarning, match=r"step 2 .* is left out: .*Read-only file system"):
        assert run.resume(runtime, optimizer) == (1, None)
