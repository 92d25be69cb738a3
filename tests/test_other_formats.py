"""Checkpoints of other programs are recognised by what they write, and whole optimizer states are cut to shards."""

import shutil

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.distributed import DistributedConfig, consolidate_distributed_checkpoint

from nemo_dist import CheckpointError, DistributedSetup, FSDP2Config, NeMoAutoModelForCausalLM, ParallelismSizes
from nemo_dist.checkpoint.manifest import Manifest
from nemo_dist.loading.other_formats import recognised, unloadable
from nemo_dist.testing.equivalence import checkpoint
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.tensors import rows_of_rank, whole
from nemo_dist.testing.tiny_models import SPECIMENS

LLAMA = SPECIMENS["llama"]
OPTIONS = {"lr": 1e-2, "eps": 1e-5}


def batch(step):
    return LLAMA.batch(4, 12, torch.Generator().manual_seed(step))


def model(folder=None):
    return transformers.AutoModelForCausalLM.from_pretrained(folder or checkpoint("llama"), dtype=torch.float32)


def write_dcp(folder):
    dcp.save({"model": {"w": torch.ones(2)}}, checkpoint_id=folder, no_dist=True)


def write_dcp_in_parts(folder):
    write_dcp(folder / "pytorch_model_fsdp_0")


def write_trainer(folder):
    model().save_pretrained(folder)
    trainer = transformers.TrainerState(global_step=3)
    trainer.save_to_json(str(folder / "trainer_state.json"))


def write_accelerate(folder):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    accelerator.prepare(torch.nn.Linear(2, 2))
    accelerator.save_state(str(folder))


def write_sharded_trainer(folder):
    write_trainer(folder)
    (folder / "model.safetensors").unlink()
    write_dcp(folder / "pytorch_model_fsdp_0")
    write_dcp(folder / "optimizer_0")


def write_transformers_shards(folder):
    save_file({"w": torch.ones(2)}, folder / "shard-00000-model-00001-of-00001.safetensors")


def write_run(folder):
    (folder / "step-00000001").mkdir()
    (folder / "step-00000001" / "manifest.json").write_text("{}")


@pytest.mark.parametrize(
    ("write", "name", "way"),
    [
        (write_dcp, "a checkpoint of torch.distributed.checkpoint", "dcp_to_torch_save"),
        (write_dcp_in_parts, "a checkpoint of torch.distributed.checkpoint", "dcp_to_torch_save"),
        (write_trainer, "a checkpoint of transformers' Trainer", "from_pretrained"),
        (write_sharded_trainer, "a checkpoint of torch.distributed.checkpoint", "folder that has .metadata"),
        (write_accelerate, "a checkpoint of accelerate", "optimizer.load_state_dict"),
        (write_transformers_shards, "a distributed checkpoint of transformers", "consolidate_distributed_checkpoint"),
        (write_run, "the folder of a run", "nemo_dist.RunFolder"),
        (lambda folder: model().save_pretrained(folder), "the folder of a model", "from_pretrained"),
    ],
)
def test_a_checkpoint_of_another_program_is_named_with_a_way_in(tmp_path, write, name, way):
    write(tmp_path)
    with pytest.raises(CheckpointError) as error:
        Manifest.read(tmp_path)
    assert f"is {name}" in str(error.value) and way in str(error.value)


def test_a_folder_of_nothing_known_is_no_checkpoint(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    assert recognised(tmp_path) is None
    with pytest.raises(CheckpointError, match="is no checkpoint, or not a complete one"):
        Manifest.read(tmp_path)


def test_only_folders_with_whole_model_files_are_left_to_transformers(tmp_path):
    write_dcp(tmp_path)
    assert "which from_pretrained does not read" in unloadable(tmp_path)
    assert unloadable(checkpoint("llama")) is None
    assert unloadable("some/name-on-the-hub") is None


def test_dcp_in_a_plain_model_becomes_a_folder_that_loads(tmp_path):
    """The way in of the message, step by step."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    expected = model()
    dcp.save({"model": expected.state_dict()}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "state.pt")
    plain = LLAMA.make(1)
    plain.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True)["model"])
    plain.save_pretrained(tmp_path / "model")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in expected.state_dict().items())


def stepped(plain, optimizer, number):
    plain(**batch(number)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def plain_run(file):
    """Take a step in one process, save, take another; return the weights after it."""
    plain = model().train()
    optimizer = torch.optim.AdamW(plain.parameters(), **OPTIONS)
    stepped(plain, optimizer, 0)
    torch.save({"model": plain.state_dict(), "optimizer": optimizer.state_dict()}, file)
    stepped(plain, optimizer, 1)
    return {name: parameter.detach() for name, parameter in plain.named_parameters()}


def on_rank_continue(folder, state, options):
    setup = DistributedSetup.build(strategy=FSDP2Config(mp_policy=FP32), **options)
    sharded = NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    runtime = setup.runtime(sharded)
    optimizer = runtime.optimizer(torch.optim.AdamW, **OPTIONS)
    optimizer.load_state_dict(torch.load(state, weights_only=True)["optimizer"])
    runtime.forward_backward(rows_of_rank(batch(1), runtime))
    optimizer.step()
    return {name: whole(parameter) for name, parameter in runtime.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"parallelism_sizes": ParallelismSizes(cp_size=2)}], ids=["fsdp2", "cp"])
def test_the_optimizer_of_one_process_goes_on_over_shards(ranks, tmp_path, options):
    expected = plain_run(tmp_path / "state.pt")
    weights = LLAMA.make(0)
    weights.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True)["model"])
    weights.save_pretrained(tmp_path / "model")
    for found in ranks(2).run(on_rank_continue, tmp_path / "model", tmp_path / "state.pt", options):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


# ---- the ways in, step by step ----


def on_rank_train_by_hand(folder, out):
    """Take a step over torch's own shards, save it with DCP, take another; return the weights after it."""
    mesh = init_device_mesh("cpu", (2,))
    plain = model(folder).train()
    for block in plain.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(plain, mesh=mesh)
    optimizer = torch.optim.AdamW(plain.parameters(), **OPTIONS)
    for number in range(2):
        if number == 1:
            weights, moments = get_state_dict(plain, optimizer)
            dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=out)
        place = dist.get_rank() * 2
        rows = {name: value[place : place + 2] for name, value in batch(number).items()}
        labels = (batch(number)["labels"][:, 1:] != -100).sum(1)
        share = 2 * labels[place : place + 2].sum() / labels.sum()  # FSDP2 takes the mean of the ranks
        (share * plain(**rows).loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: whole(parameter) for name, parameter in plain.named_parameters()}


def on_rank_take_over_dcp(folder, given, out):
    """Load the folder as the message says, save it as ours, load that into a new run, and go on."""
    setup = DistributedSetup.build(strategy=FSDP2Config(mp_policy=FP32))

    def made():
        sharded = NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
        runtime = setup.runtime(sharded)
        return runtime, runtime.optimizer(torch.optim.AdamW, **OPTIONS)

    runtime, optimizer = made()
    weights, moments = get_state_dict(runtime.model, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=given)
    set_state_dict(runtime.model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    runtime.save(out, optimizer)
    runtime, optimizer = made()
    runtime.load(out, optimizer)
    runtime.forward_backward(rows_of_rank(batch(1), runtime))
    optimizer.step()
    return {name: whole(parameter) for name, parameter in runtime.named_parameters()}


@pytest.mark.slow
def test_dcp_of_model_and_optimizer_goes_on_as_ours(ranks, tmp_path):
    expected, _ = ranks(2).run(on_rank_train_by_hand, checkpoint("llama"), tmp_path / "dcp")
    for found in ranks(2).run(on_rank_take_over_dcp, checkpoint("llama", 1), tmp_path / "dcp", tmp_path / "ours"):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def on_rank_save_transformers_shards(folder, out):
    sharded = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, distributed_config=DistributedConfig(fsdp_size=2)
    )
    sharded.save_pretrained(out, distributed_checkpoint=True)


@pytest.mark.slow
def test_a_distributed_checkpoint_of_transformers_becomes_a_folder_that_loads(ranks, tmp_path):
    ranks(2).run(on_rank_save_transformers_shards, checkpoint("llama"), tmp_path / "shards")
    assert "consolidate_distributed_checkpoint" in unloadable(tmp_path / "shards")
    consolidate_distributed_checkpoint(tmp_path / "shards", tmp_path / "out")
    shutil.copy(tmp_path / "shards" / "config.json", tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model().state_dict().items())


def rows():
    return [{name: value[row] for name, value in batch(step).items()} for step in range(2) for row in range(4)]


def groups(parameters, decayed):
    """Return parameter groups as Trainer makes them."""
    named = dict(parameters)
    return [
        {"params": [named[name] for name in named if (name in decayed) is decays], "weight_decay": 0.1 * decays}
        for decays in (True, False)
    ]


def on_rank_go_on_from_trainer(folder, decayed):
    setup = DistributedSetup.build(strategy=FSDP2Config(mp_policy=FP32))
    sharded = NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    runtime = setup.runtime(sharded)
    optimizer = runtime.optimizer(torch.optim.AdamW, groups(runtime.named_parameters(), decayed), **OPTIONS)
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
    runtime.forward_backward(rows_of_rank(batch(1), runtime))
    optimizer.step()
    return {name: whole(parameter) for name, parameter in runtime.named_parameters()}


@pytest.mark.slow
def test_a_run_of_trainer_goes_on_over_shards(ranks, tmp_path):
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=4,
        train_sampling_strategy="sequential",
        learning_rate=OPTIONS["lr"],
        adam_epsilon=OPTIONS["eps"],
        lr_scheduler_type="constant",
        weight_decay=0.1,
        max_grad_norm=0.0,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model=model(), args=arguments, train_dataset=rows())
    trainer.train()
    decayed = trainer.get_decay_parameter_names(trainer.model)
    for found in ranks(2).run(on_rank_go_on_from_trainer, tmp_path / "checkpoint-1", decayed):
        for name, value in trainer.model.named_parameters():
            torch.testing.assert_close(found[name], value.detach(), rtol=1e-5, atol=1e-6)


def on_rank_load_a_part(folder):
    setup = DistributedSetup.build(strategy=FSDP2Config(mp_policy=FP32))
    sharded = NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    optimizer = setup.runtime(sharded).optimizer(torch.optim.AdamW, **OPTIONS)
    state = optimizer.state_dict()
    state["state"] = {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3, 5), "exp_avg_sq": torch.zeros(3, 5)}}
    try:
        optimizer.load_state_dict(state)
    except ValueError as error:
        return str(error)
    return "loaded"


def test_a_part_of_a_moment_is_refused_when_it_is_loaded(ranks):
    for answer in ranks(2).run(on_rank_load_a_part, checkpoint("llama")):
        assert "'exp_avg' of the optimizer has shape (3, 5)" in answer and "pass whole tensors" in answer
