"""No save destroys what it did not write, no checkpoint is committed that lacks a rank, no junk changes a run."""

import json
import os
import random
import subprocess
import sys
import textwrap
import warnings

import checkpoint_runs as runs
import pytest
import torch
import torch.distributed as dist
from cases import cases, slow
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from scripts import START

from nemo_dist import CheckpointError, RunFolder, initialize_distributed
from nemo_dist.checkpoint.json_state import from_json, to_json
from nemo_dist.checkpoint.layout import Chunk
from nemo_dist.checkpoint.manifest import Manifest, sealed
from nemo_dist.checkpoint.stored_tensor import StoredChunk, overlap

TRAIN = (
    START
    + """
    env, runtime, optimizer = start()
    run = RunFolder(sys.argv[1], keep_last=1)
    for step in range(1, 3):
        train(runtime, optimizer)
        handle = run.save(runtime, optimizer, step=step, asynchronous=step == 2)
"""
)

ENDS = {
    "destroyed, then awaited": "dist.destroy_process_group(); handle.wait()",
    "destroyed, then exit": "dist.destroy_process_group()",
    "exit": "",
    "exception": "dist.destroy_process_group(); raise SystemExit('as any error')",
}


def launched(tmp_path, script, *arguments):
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(script))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", path]
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


@cases(("end",), [(end,) if index == 1 else slow(end) for index, end in enumerate(ENDS)])
def test_an_asynchronous_save_survives_the_end_of_its_process_group(tmp_path, end):
    run = RunFolder(tmp_path / "run")
    ended = launched(tmp_path, TRAIN + f"\n    {ENDS[end]}\n", run.path)
    assert "an asynchronous save failed" not in ended.stderr, ended.stderr
    assert run.steps() == [2]
    saved = Manifest.read(run.latest())
    assert [file["name"] for file in saved.files] == ["rank-00000.safetensors", "rank-00001.safetensors"]
    for index in range(2):
        saved.verify(index)


@pytest.mark.slow
def test_a_save_after_the_end_of_the_process_group_is_refused(tmp_path):
    after = "dist.destroy_process_group()\n    run.save(runtime, optimizer, step=3)\n"
    ended = launched(tmp_path, TRAIN + f"\n    handle.wait()\n    {after}", tmp_path / "run")
    assert ended.returncode
    assert "the process group is destroyed, so ranks [0, 1] cannot meet" in ended.stderr
    assert RunFolder(tmp_path / "run").steps() == [2]


# ---- folders ----


@pytest.fixture(scope="module")
def group_of_one():
    initialize_distributed("gloo")
    runs.FOLDERS.update(runs.folders("llama"))
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def one(group_of_one):
    """A runtime and its optimizer after one step, in this process alone."""
    runtime, optimizer = runs.start("fsdp2")
    runs.steps(runtime, optimizer, runs.Task(), range(1))
    return runtime, optimizer


def content(folder):
    return {str(path.relative_to(folder)): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def users_folder(folder, runtime, optimizer):
    (folder / "sub").mkdir()
    (folder / "sub" / "data.bin").write_bytes(b"1")
    (folder / "notes.txt").write_text("mine")


def model_folder(folder, runtime, optimizer):
    runtime.export(folder)


def run_folder(folder, runtime, optimizer):
    RunFolder(folder).save(runtime, optimizer, step=1)


def web_app(folder, runtime, optimizer):
    (folder / "manifest.json").write_text('{"name": "an app"}')


def half_downloaded(folder, runtime, optimizer):
    (folder / "hf").mkdir()


@pytest.mark.parametrize("fill", [users_folder, model_folder, run_folder, web_app, half_downloaded])
def test_a_save_into_a_folder_that_is_no_checkpoint_is_refused_and_changes_nothing(one, tmp_path, fill):
    runtime, optimizer = one
    place = tmp_path / "place"
    place.mkdir()
    fill(place, runtime, optimizer)
    before = content(tmp_path)
    with pytest.raises(CheckpointError, match="is not a checkpoint, and a save would replace what it has"):
        runtime.save(place, optimizer)
    assert content(tmp_path) == before


def test_an_export_replaces_only_the_weights_that_would_be_loaded_in_its_place(one, tmp_path):
    runtime, _ = one
    replaced = ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    replaced += ["pytorch_model.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"]
    kept = ["model.fp16.safetensors", "model_before.safetensors", "pytorch_model_ema.bin", "models.safetensors"]
    for name in replaced + kept:
        (tmp_path / name).write_text("old")
    runtime.export(tmp_path)
    assert [name for name in kept if (tmp_path / name).read_text() != "old"] == []
    assert [name for name in replaced if (tmp_path / name).exists()] == ["model.safetensors"]
    assert load_file(tmp_path / "model.safetensors")


def test_an_export_beside_adapters_is_refused_and_changes_nothing(one, tmp_path):
    """Transformers would add them to the weights, into which they may have been merged."""
    runtime, _ = one
    (tmp_path / "adapter_config.json").write_text("{}")
    before = content(tmp_path)
    with pytest.raises(CheckpointError, match="which from_pretrained would add to the exported weights; export to an"):
        runtime.export(tmp_path)
    assert content(tmp_path) == before


def test_a_save_over_a_checkpoint_keeps_what_a_user_put_beside_it(one, tmp_path):
    runtime, optimizer = one
    runtime.save(tmp_path / "c", optimizer, extra=1)
    (tmp_path / "c" / "notes.txt").write_text("mine")
    (tmp_path / "c" / "plots").mkdir()
    (tmp_path / "c" / "plots" / "loss.png").write_bytes(b"png")
    runtime.save(tmp_path / "c", optimizer, extra=2)
    assert (tmp_path / "c" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "c" / "plots" / "loss.png").read_bytes() == b"png"
    assert Manifest.read(tmp_path / "c").about["extra"] == 2


def test_a_damaged_checkpoint_may_be_saved_over(one, tmp_path):
    runtime, optimizer = one
    runtime.save(tmp_path / "c", optimizer)
    (tmp_path / "c" / "manifest.json").write_text("{")
    runtime.save(tmp_path / "c", optimizer, extra=2)
    assert Manifest.read(tmp_path / "c").about["extra"] == 2


@pytest.mark.parametrize(
    "left", [".step-00000001.old", "step-1", "step-00000001 (copy)", ".step-00000001.removed", "step-00000001.bak"]
)
def test_leftovers_and_copies_never_break_later_saves(one, tmp_path, left):
    runtime, optimizer = one
    run = RunFolder(tmp_path, keep_last=2)
    run.save(runtime, optimizer, step=1)
    (tmp_path / left).mkdir()
    (tmp_path / left / "file").write_text("x")
    for step in range(2, 6):
        run.save(runtime, optimizer, step=step)
    assert run.steps() == [4, 5]
    ours = left.startswith(".step")  # what an interrupted save or removal of ours leaves is tidied up, the rest stays
    assert (tmp_path / left).exists() is not ours


def test_a_commit_between_its_two_renames_is_listed_and_finished(one, tmp_path):
    runtime, optimizer = one
    run = RunFolder(tmp_path, keep_last=2)
    run.save(runtime, optimizer, step=1)
    run.save(runtime, optimizer, step=2)
    (tmp_path / "step-00000002").rename(tmp_path / ".step-00000002.partial")
    (tmp_path / ".step-00000002.old").mkdir()
    assert run.steps() == [1, 2]
    run.save(runtime, optimizer, step=3)
    assert run.steps() == [2, 3]
    assert Manifest.read(tmp_path / "step-00000002").about["step"] == 2


# ---- weights that are not finite ----


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_save_names_weights_that_are_not_finite(group_of_one, tmp_path, value):
    runtime, _ = runs.start("fsdp2")
    weight = dict(runtime.named_parameters())["model.norm.weight"]
    with torch.no_grad():
        weight.to_local()[3] = value
    with pytest.warns(UserWarning, match=r"not finite: model/model\.norm\.weight"):
        runtime.save(tmp_path / "c")
    with pytest.warns(UserWarning, match=r"not finite: model/model\.norm\.weight"):
        runtime.save(tmp_path / "d", asynchronous=True).wait()
    assert Manifest.read(tmp_path / "c").not_finite == ["model/model.norm.weight[0:32]"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runtime.save(tmp_path / "e", check_finite=False)


def test_the_newest_finite_checkpoint_is_kept(group_of_one, tmp_path):
    runtime, _ = runs.start("fsdp2")
    kept, free = (
        RunFolder(tmp_path / "kept", keep_last=1),
        RunFolder(tmp_path / "free", keep_last=1, check_finite=False),
    )
    for step in range(1, 5):
        if step == 3:
            with torch.no_grad():
                next(iter(runtime.named_parameters()))[1].to_local().fill_(float("nan"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kept.save(runtime, step=step)
            free.save(runtime, step=step)
    assert kept.steps() == [2, 4]
    assert free.steps() == [4]


# ---- junk ----


def test_every_file_of_a_checkpoint_is_under_a_checksum(one, tmp_path):
    runtime, optimizer = one
    for name in ("config.json", "generation_config.json"):
        place = tmp_path / name
        runtime.save(place, optimizer)
        content = bytearray((place / "hf" / name).read_bytes())
        content[-3] ^= 1
        (place / "hf" / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{name} is damaged: its checksum is"):
            runtime.load(place, optimizer)


def test_a_link_out_of_the_checkpoint_is_refused(one, tmp_path):
    runtime, optimizer = one
    runtime.save(tmp_path / "c", optimizer)
    shard = tmp_path / "c" / "rank-00000.safetensors"
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="leads out of the checkpoint"):
        runtime.load(tmp_path / "c", optimizer)


@given(st.data())
def test_chunks_overlap_when_they_share_an_element(data):
    ndim = data.draw(st.integers(0, 3))
    span = st.tuples(st.integers(0, 5), st.integers(1, 4))
    drawn = data.draw(st.lists(st.lists(span, min_size=ndim, max_size=ndim), max_size=5))
    pieces = [StoredChunk(Chunk(tuple(a for a, _ in spans), tuple(n for _, n in spans)), 0) for spans in drawn]
    seen, shared = set(), False
    for spans in drawn:
        elements = [()]
        for start, size in spans:
            elements = [(*element, index) for element in elements for index in range(start, start + size)]
        shared |= bool(seen & set(elements))
        seen |= set(elements)
    assert overlap(pieces) is shared


def paths(value, at=()):
    """Yield the path to every value of nested JSON."""
    yield at
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(inner, (*at, key))


JUNK = (None, True, -1, 10**30, 1.5, "", "x", [], [[]], {}, {"nemo_dist": "tensor"}, {"nemo_dist": "deque", "value": 3})
MISSING = object()


def forged(content, path, junk):
    """Return a copy of *content* with *junk* at *path*, or without what is there."""
    copy = json.loads(json.dumps(content))
    inner = copy
    for step in path[:-1]:
        inner = inner[step]
    if junk is MISSING:
        del inner[path[-1]]
    else:
        inner[path[-1]] = junk
    return copy


@pytest.fixture(scope="module")
def saved(one, tmp_path_factory):
    runtime, optimizer = one
    place = tmp_path_factory.mktemp("forged") / "c"
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    runtime.save(place, optimizer, extra={"epoch": 3, "mask": torch.ones(2)}, schedulers=[scheduler])
    content = json.loads((place / "manifest.json").read_text())
    listed = [path for path in paths(content) if path and path[0] != "checksum"]
    few = [path for path in listed if path[0] != "tensors" or len(path) < 2 or "norm" in path[1]]
    return place, content, few


@cases(("count",), [(60,), slow(1000)], lambda count: f"{count} of them")
def test_a_forged_manifest_is_refused_or_loads_what_was_saved(one, saved, count):
    runtime, optimizer = one
    place, content, listed = saved
    draw, refused, before = random.Random(0), 0, state(runtime, optimizer)
    for _ in range(count):
        path, junk = draw.choice(listed), draw.choice((*JUNK, MISSING))
        try:
            load(runtime, optimizer, place, forged(content, path, junk))
            weights = runs.everything(runtime)
            assert all(torch.equal(weights[name], before[name]) for name in weights), (path, junk)
            load(runtime, optimizer, place, content)
        except CheckpointError:
            refused += 1
        after = state(runtime, optimizer)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], value) for name, value in before.items()), (path, junk)
    assert count / 2 < refused < count


def state(runtime, optimizer):
    return runs.everything(runtime, optimizer) | {"generator": torch.get_rng_state()}


def load(runtime, optimizer, place, content):
    listed = {name: value for name, value in content.items() if name != "checksum"}
    (place / "manifest.json").write_bytes(sealed(listed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runtime.load(place, optimizer, schedulers=[torch.optim.lr_scheduler.StepLR(optimizer, 2)])


def test_values_that_no_checkpoint_can_hold_are_refused_in_words():
    loop = []
    loop.append(loop)
    deep = "leaf"
    for _ in range(3000):
        deep = [deep]
    sparse, meta = torch.eye(2).to_sparse(), torch.empty(2, device="meta")
    for value, words in [(loop, "contains itself"), (deep, "nested deeper"), (10**5000, "too large")]:
        with pytest.raises(TypeError, match=words):
            to_json({"state": value})
    for value in (sparse, meta):
        with pytest.raises(TypeError, match="which cannot be saved"):
            to_json({"state": value})


def test_brackets_in_keys_are_not_levels():
    value = {"[" * 500: {"a": [(1, {2: "x"})]}}
    assert from_json(to_json(value)) == value


def test_the_copy_of_an_asynchronous_save_is_freed_when_it_is_durable(group_of_one, tmp_path):
    import gc

    runtime, optimizer = runs.start("fsdp2")
    gc.collect()

    def held():
        return sum(t.nbytes for t in gc.get_objects() if isinstance(t, torch.Tensor) and not t.is_meta)

    before = held()
    runtime.save(tmp_path / "c", optimizer, asynchronous=True).wait()
    gc.collect()
    assert held() <= before + 10_000
