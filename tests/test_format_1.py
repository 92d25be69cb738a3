"""Checkpoints that version 0.1 wrote, in format 1, load under any topology, and export."""

import json
import shutil

import checkpoint_runs as runs
import format_1
import pytest
import torch
import transformers
from cases import cases, slow
from safetensors.torch import load_file

from nemo_dist import CheckpointError, DistributedSetup, NeMoAutoModelForCausalLM, RunFolder, export_checkpoint
from nemo_dist.checkpoint.manifest import Manifest

# The model has two layers, so a rank of a pipeline has one stage.
SETUPS = runs.SETUPS | {"pp": {**runs.SETUPS["pp"], "pipeline_config": {"pp_schedule": "1f1b"}}}
EXPECTED = json.loads((format_1.HERE / "expected.json").read_text())


def on_rank_load_format_1(name, path, again):
    """Load it into a new run, save that in today's format, and load the result."""
    setup = DistributedSetup.build(**SETUPS[name])
    config = transformers.Phi3Config(**format_1.CONFIG)
    model = NeMoAutoModelForCausalLM.from_config(config, distributed_setup=setup, dtype=torch.float32)
    runtime = setup.runtime(model)
    optimizer = runtime.optimizer(torch.optim.AdamW, lr=7.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    found = []
    for source in (path, again):
        feed = format_1.Position(0)
        extra = runtime.load(source, optimizer, schedulers=[scheduler], data=feed)
        drawn, rate = torch.rand(3).tolist(), optimizer.param_groups[0]["lr"]
        found.append((runs.digests(runs.everything(runtime, optimizer)), extra, feed.at, drawn, rate))
        if source is path:
            runtime.load(source, optimizer, schedulers=[scheduler], data=feed)
            runtime.save(again, optimizer, schedulers=[scheduler], data=feed, extra=extra)
    return found


@cases(("name", "world"), [("fsdp2", 2), slow("tp", 2), slow("pp", 2), slow("ddp", 1), slow("hsdp-tp", 4)])
def test_a_checkpoint_of_format_1_loads_and_is_saved_anew(ranks, tmp_path, name, world):
    answers = ranks(world).run(on_rank_load_format_1, name, format_1.CHECKPOINT, tmp_path / "c")
    for index in (0, 1):
        assert runs.joined([answer[index][0] for answer in answers]) == EXPECTED["tensors"]
        for rank, answer in enumerate(answers):
            _, extra, at, drawn, rate = answer[index]
            assert (extra["step"], extra["mask"].tolist(), at, rate) == (2, [True, False], 12, 0.0025)
            assert rank or drawn == EXPECTED["drawn"]
    assert Manifest.read(format_1.CHECKPOINT).about["format"] == 1
    assert Manifest.read(tmp_path / "c").about["format"] == 2


def test_a_checkpoint_of_format_1_is_exported_without_its_ranks(tmp_path):
    export_checkpoint(format_1.CHECKPOINT, tmp_path / "exported")
    found = {f"model/{name}": tensor for name, tensor in load_file(tmp_path / "exported/model.safetensors").items()}
    weights = {name: text for name, text in EXPECTED["tensors"].items() if name.startswith("model/")}
    assert runs.digests(found) == weights


@pytest.mark.parametrize("change", [b'"lr": 0.0025', b'"step": 2'])
def test_a_damaged_manifest_of_format_1_is_refused(tmp_path, change):
    shutil.copytree(format_1.CHECKPOINT, tmp_path / "step-00000002")
    manifest = tmp_path / "step-00000002" / "manifest.json"
    assert RunFolder(tmp_path).latest() is not None
    text = manifest.read_bytes()
    assert change in text
    manifest.write_bytes(text.replace(change, change[:-1] + b"3"))
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged: its checksum"):
        Manifest.read(manifest.parent)
    assert RunFolder(tmp_path).latest() is None
