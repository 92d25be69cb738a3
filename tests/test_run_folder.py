"""The folder of a run keeps what it should, names the newest, and goes on from the newest that is whole."""

import errno
import os
import warnings

import checkpoint_runs as runs
import pytest
from cases import case_id, cases
from typer.testing import CliRunner

from nemo_dist import RunFolder, export_checkpoint
from nemo_dist.checkpoint.manifest import Manifest
from nemo_dist.cli.main import app
from nemo_dist.errors import CheckpointError
from nemo_dist.testing.equivalence import checkpoint
from nemo_dist.testing.tensors import saved_weights
from nemo_dist.testing.tiny_models import SPECIMENS


def on_rank_save_steps(folders, path, steps, keep):
    runs.FOLDERS.update(folders)
    runtime, optimizer = runs.start("fsdp2")
    folder = RunFolder(path, **keep)
    for step in steps:
        folder.save(runtime, optimizer, step=step, extra=f"step {step}", asynchronous=step % 3 == 0).wait()
    return folder.steps()


def on_rank_resume(folders, path):
    runs.FOLDERS.update(folders)
    runtime, optimizer = runs.start("fsdp2")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = RunFolder(path).resume(runtime, optimizer)
    return found, [str(warning.message) for warning in caught if "left out" in str(warning.message)]


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        ({}, [1, 2, 3, 4, 5, 6]),
        ({"keep_last": 2}, [5, 6]),
        ({"keep_last": 1}, [6]),
        ({"keep_last": 2, "keep_every": 3}, [3, 5, 6]),
        ({"keep_last": 1, "keep_every": 2}, [2, 4, 6]),
    ],
    ids=str,
)
def test_the_newest_and_every_kth_checkpoint_are_kept(ranks, tmp_path, keep, left):
    assert ranks(2).run(on_rank_save_steps, runs.folders("llama"), tmp_path / "run", range(1, 7), keep) == [left, left]
    names = sorted(entry.name for entry in (tmp_path / "run").iterdir())
    assert names == [".lock", "latest", *(f"step-{step:08d}" for step in left)]
    assert (tmp_path / "run" / "latest").read_text() == "step-00000006\n"
    assert RunFolder(tmp_path / "run").latest() == tmp_path / "run" / "step-00000006"
    assert Manifest.read(tmp_path / "run" / "step-00000006").about["step"] == 6


def damage(path):
    os.truncate(path / "rank-00000.safetensors", 100)


def flip(path):
    content = bytearray((path / "rank-00000.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "rank-00000.safetensors").write_bytes(content)


@pytest.mark.parametrize("harm", [damage, flip])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_loaded(ranks, tmp_path, harm):
    folders, path = runs.folders("llama"), tmp_path / "run"
    ranks(2).run(on_rank_save_steps, folders, path, [1, 2, 3], {})
    harm(path / "step-00000003")
    for found, warned in ranks(2).run(on_rank_resume, folders, path):
        assert found == (2, "step 2")
        assert len(warned) == 1 and "step 3" in warned[0] and "rank-00000.safetensors" in warned[0]
    for step in (1, 2):
        harm(path / f"step-{step:08d}")
    with pytest.raises(Exception, match=r"none of the checkpoints in .* is whole: steps \[3, 2, 1\]"):
        ranks(2).run(on_rank_resume, folders, path)


def test_latest_points_to_the_older_step_after_a_run_went_back(ranks, tmp_path):
    folders, path = runs.folders("llama"), tmp_path / "run"
    ranks(2).run(on_rank_save_steps, folders, path, [1, 2, 9], {})
    ranks(2).run(on_rank_save_steps, folders, path, [3], {})
    assert RunFolder(path).latest().name == "step-00000003"
    assert [found for found, _ in ranks(2).run(on_rank_resume, folders, path)] == [(3, "step 3")] * 2
    damage(path / "step-00000003")
    assert [found for found, _ in ranks(2).run(on_rank_resume, folders, path)] == [(2, "step 2")] * 2


def test_without_a_pointer_the_highest_step_is_the_newest(ranks, tmp_path):
    folders, path = runs.folders("llama"), tmp_path / "run"
    ranks(2).run(on_rank_save_steps, folders, path, [1, 2], {})
    (path / "latest").write_text("../../etc\n")
    assert RunFolder(path).latest().name == "step-00000002"


def test_a_folder_without_checkpoints_starts_from_nothing(ranks, tmp_path):
    assert [found for found, _ in ranks(2).run(on_rank_resume, runs.folders("llama"), tmp_path / "none")] == [
        None,
        None,
    ]
    assert RunFolder(tmp_path / "none").latest() is None


@pytest.mark.parametrize(
    "option", [{"keep_last": 0}, {"keep_every": -1}, {"keep_last": 1.5}, {"keep_last": True}], ids=str
)
def test_numbers_of_checkpoints_to_keep_must_be_positive(option):
    with pytest.raises((TypeError, ValueError), match="must be an int from 1 up"):
        RunFolder("run", **option)


# ---- an export without the ranks ----


def on_rank_save_and_export(name, folders, path, out, specimen):
    runs.FOLDERS.update(folders)
    runtime, optimizer = runs.start(name, specimen)
    runs.steps(runtime, optimizer, runs.Task(specimen=specimen), range(1))
    RunFolder(path).save(runtime, optimizer, step=1)
    runtime.export(out)


@cases(
    ("name", "world", "specimen"),
    [("fsdp2", 2, "llama-tied"), ("tp", 2, "phi3"), ("pp", 2, "llama-deep-tied"), ("hsdp", 4, "llava")],
    lambda name, world, specimen: case_id(specimen, world, name),
)
def test_the_command_exports_what_the_ranks_would(ranks, tmp_path, name, world, specimen):
    run, ours, out = tmp_path / "run", tmp_path / "ours", tmp_path / "out"
    ranks(world).run(on_rank_save_and_export, name, runs.folders(specimen), run, ours, specimen)
    answer = CliRunner().invoke(app, ["export", str(run), str(out), "--max-shard-size", "50KB"])
    assert answer.exit_code == 0, answer.output
    assert "step-00000001" in answer.output
    expected = saved_weights(ours)
    assert expected.keys() == saved_weights(checkpoint(specimen)).keys()
    found = saved_weights(out)
    assert found.keys() == expected.keys()
    assert all(found[key].equal(tensor) for key, tensor in expected.items())
    for file in ("config.json", "generation_config.json"):
        if (ours / file).exists():
            assert (out / file).read_text() == (ours / file).read_text()
    loaded = SPECIMENS[specimen].load.from_pretrained(out)
    assert type(loaded).__name__ == SPECIMENS[specimen].load.from_pretrained(checkpoint(specimen)).__class__.__name__


def test_the_command_exports_the_newest_checkpoint_that_is_whole(ranks, tmp_path):
    ranks(2).run(on_rank_save_steps, runs.folders("llama"), tmp_path / "run", [1, 2], {})
    weights = tmp_path / "run" / "step-00000002" / "rank-00000.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.warns(UserWarning, match="step 2 of .* is left out"):
        answer = CliRunner().invoke(app, ["export", str(tmp_path / "run"), str(tmp_path / "out")])
    assert answer.exit_code == 0, answer.output
    assert "step-00000001" in answer.output


def test_the_command_refuses_in_one_block(tmp_path):
    answer = CliRunner().invoke(app, ["export", str(tmp_path / "none"), str(tmp_path / "out")])
    assert answer.exit_code == 2
    assert answer.output.startswith("error: there is no checkpoint at")
    assert not (tmp_path / "out").exists()


def test_a_path_that_is_too_long_is_said_once(tmp_path):
    answer = CliRunner().invoke(app, ["export", "1" * 5000, str(tmp_path / "out")])
    assert answer.exit_code == 2 and answer.stderr.count("1" * 5000) == 1
    assert answer.stderr.startswith("error: looking for the checkpoint failed: [Errno 36] File name too long: ")


def test_a_class_that_transformers_lacks_is_refused(ranks, tmp_path):
    ranks(2).run(on_rank_save_steps, runs.folders("llama"), tmp_path / "run", [1], {})
    for name in ("NoSuchModel", "AutoConfig", "logging"):
        runs.rewrite(tmp_path / "run" / "step-00000001", model=lambda _, name=name: name)
        with pytest.raises(CheckpointError, match=f"is of a {name}, which transformers"):
            export_checkpoint(tmp_path / "run", tmp_path / "out")


def gone(*_):
    raise OSError(errno.EIO, "Input/output error")  # as of a read, which names no file


def test_a_file_that_the_disk_does_not_give_is_named(ranks, tmp_path, monkeypatch):
    ranks(1).run(on_rank_save_steps, runs.folders("llama"), tmp_path / "run", [1], {})
    monkeypatch.setattr("nemo_dist.checkpoint.manifest._crc32", gone)
    manifest = Manifest.read(tmp_path / "run" / "step-00000001")
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors cannot be read: .*Input/output error"):
        manifest.verify(0)


def test_an_older_checkpoint_that_the_disk_does_not_give_fails_no_save(tmp_path, monkeypatch):
    monkeypatch.setattr(Manifest, "read", gone)
    assert not RunFolder(tmp_path)._finite(1)
