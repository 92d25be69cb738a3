"""Ranks that were given different things are told at once: what differs, and on which rank."""

import os
import shutil
import time

import checkpoint_runs as runs
import pytest
import torch
import transformers
from cases import cases, slow

from nemo_dist import DistributedSetup, NeMoAutoModelForCausalLM, RankError, RunFolder
from nemo_dist.testing.equivalence import checkpoint
from nemo_dist.testing.failure_report import RankFailure
from nemo_dist.testing.pool import RankPool
from nemo_dist.testing.tensors import rows_of_rank

SOON = 50  # seconds, on a machine that others use too: less than a collective waits, and a half hour less than a save


def on_rank_disagree(folders, path, what):
    """Do *what* as the others do, on rank 1 with something else; return what this rank is told, and how soon."""
    runs.FOLDERS.update(folders)
    odd = int(torch.distributed.get_rank() == 1)
    runtime, optimizer = runs.start("fsdp2")
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    calls = {
        "path": lambda: runtime.save(f"{path}/{odd}", optimizer),
        "step": lambda: RunFolder(path).save(runtime, optimizer, step=1 + odd),
        "extra": lambda: runtime.save(path, optimizer, extra={"epoch": odd}),
        "long extra": lambda: runtime.save(path, optimizer, extra=["x"] * 100 + [odd]),
        "a scheduler": lambda: runtime.save(path, optimizer, schedulers=[scheduler][odd:]),
        "an optimizer": lambda: runtime.save(path, [optimizer, None][odd]),
        "another optimizer": lambda: runtime.save(
            path, [optimizer, torch.optim.SGD(runtime.model.parameters(), momentum=0.9)][odd]
        ),
        "the type": lambda: runtime.optimizer([torch.optim.AdamW, torch.optim.SGD][odd], lr=1e-3),
        "the rate": lambda: runtime.optimizer(torch.optim.AdamW, lr=[0.1, 0.01][odd]),
        "the rate as a tensor": lambda: runtime.optimizer(torch.optim.AdamW, lr=torch.tensor([0.5, 0.25][odd])),
        "the rate of a group": lambda: runtime.optimizer(
            torch.optim.AdamW, [{"params": list(runtime.model.parameters()), "lr": [0.1, 0.01][odd]}]
        ),
        "a weight that is left out": lambda: runtime.optimizer(
            torch.optim.AdamW, list(runtime.model.parameters())[odd:], lr=0.1
        ),
        "a rate that was set": lambda: (
            optimizer.param_groups[0].update(lr=[0.1, 0.01][odd]),
            runtime.save(path, optimizer),
        ),
        "the seed": lambda: DistributedSetup.build().seed(odd),
        "betas": lambda: runtime.optimizer(torch.optim.AdamW, betas=[(0.9, 0.95), (0.9, 0.99)][odd]),
    }
    start = time.monotonic()
    with pytest.raises(RankError) as caught:
        calls[what]()
    return str(caught.value), time.monotonic() - start


EXPECTED = {
    "path": "c/1 on rank 1, but ",
    "step": "step is 2 on rank 1, but 1 on the others",
    "extra": 'extra is {"epoch": 1} on rank 1, but {"epoch": 0} on the others',
    "long extra": ") on rank 1, but [",
    "a scheduler": "schedulers is [] on rank 1, but ",
    "an optimizer": 'optimizer is null on rank 1, but "AdamW" on the others',
    "another optimizer": 'optimizer is "SGD" on rank 1, but "AdamW" on the others',
    "the type": "type is torch.optim.sgd.SGD on rank 1, but torch.optim.adamw.AdamW on the others",
    "the rate": "lr is 0.01 on rank 1, but 0.1 on the others",
    "the rate as a tensor": "lr is 0.25 on rank 1, but 0.5 on the others",
    "the rate of a group": "lr of model.embed_tokens.weight is 0.01 on rank 1, but 0.1 on the others",
    "a weight that is left out": "a step of model.embed_tokens.weight is left out on rank 1, but taken on the others",
    "a rate that was set": "lr of model.embed_tokens.weight is 0.01 on rank 1, but 0.1 on the others",
    "the seed": "seed is 1 on rank 1, but 0 on the others",
    "betas": "betas is (0.9, 0.99) on rank 1, but (0.9, 0.95) on the others",
}


WORLDS = [pytest.param(2, id="2 ranks"), pytest.param(4, id="4 ranks", marks=pytest.mark.slow)]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("what", EXPECTED)
def test_ranks_that_differ_are_told_at_once(ranks, tmp_path, what, world):
    answers = ranks(world).run(on_rank_disagree, runs.folders("llama"), tmp_path / "c", what)
    for message, seconds in answers:
        assert EXPECTED[what] in message
        assert seconds < SOON
    assert not list(tmp_path.iterdir())


def on_rank_go_separate_ways(folders, path, what, alone):
    """Have rank *alone* do something that the others do not; return what it, or they, are told, and how soon."""
    runs.FOLDERS.update(folders)
    rank = torch.distributed.get_rank()
    runtime, optimizer = runs.start("fsdp2")
    runs.steps(runtime, optimizer, runs.Task(), range(2))

    def train():
        batch = rows_of_rank(runs.Task().batches(2)[0], runtime)
        runtime.forward_backward(batch)  # waits for the other until the pool ends this process

    calls = {
        "save, train": (lambda: runtime.save(path, optimizer), train),
        "save, export": (lambda: runtime.save(path, optimizer), lambda: runtime.export(f"{path}-export")),
        "save, load": (lambda: runtime.save(path, optimizer), lambda: runtime.load(path, optimizer)),
        "export, train": (lambda: runtime.export(path), train),
        "an optimizer, train": (lambda: runtime.optimizer(torch.optim.AdamW), train),
    }
    start = time.monotonic()
    try:
        calls[what][rank != alone]()
    except RankError as error:
        told = str(error)
    except RuntimeError as error:  # the connection to a rank that was told and has ended
        told = f"raw: {error}"
    (path.parent / f"told-{rank}").write_text(f"{time.monotonic() - start:.1f}\n{told}")
    os._exit(1)  # as a script ends that nobody catches the error of


SEPARATE = {
    "save, train": ["trains on, in step 3", "at 'collecting the state of the run' after step 2"],
    "save, export": ["waits at", "'collecting what to export'", "'collecting the state of the run'"],
    "save, load": ["waits at", "'collecting the state of the run'"],
    "export, train": ["trains on, in step 3", "at 'collecting what to export' after step 2"],
    "an optimizer, train": ["trains on, in step 3", "after step 2"],
}


@cases(
    ("what", "world", "alone"),
    [
        ("save, train", 2, 0),
        slow("save, train", 2, 1),
        slow("save, train", 4, 0),
        slow("save, train", 4, 3),
        ("save, export", 2, 1),
        *(slow(what, world, 0) for what in list(SEPARATE)[1:] for world in (2, 4)),
    ],
    lambda what, world, alone: f"{what}, {world} ranks, rank {alone} alone",
)
def test_a_rank_that_goes_its_own_way_is_named_at_once(tmp_path, what, world, alone):
    with RankPool(world) as pool, pytest.raises(RankFailure):
        pool.run(on_rank_go_separate_ways, runs.folders("llama"), tmp_path / "c", what, alone)
    told = [path.read_text().partition("\n") for path in sorted(tmp_path.glob("told-*"))]
    assert all(float(seconds) < SOON for seconds, _, _ in told)
    messages = [message for _, _, message in told if not message.startswith("raw: ")]
    assert messages
    for words in SEPARATE[what]:
        assert any(words in message for message in messages), messages
    assert any(f"rank {alone} " in message for message in messages), messages


def on_rank_take_long_and_come(folders, path):
    """Rank 1 takes long over its step and comes to the save then; rank 0 must wait for it."""
    runs.FOLDERS.update(folders)
    runtime, optimizer = runs.start("ddp")
    if runtime.dp_rank == 1:
        forward = runtime.model.forward

        def slowly(*args, **options):
            time.sleep(8)
            return forward(*args, **options)

        runtime.model.forward = slowly
    runs.steps(runtime, optimizer, runs.Task(), range(1))
    if runtime.dp_rank == 1:
        time.sleep(8)
    runtime.save(path, optimizer, extra=1)
    return runtime.load(path, optimizer)


@pytest.mark.slow
def test_a_rank_that_is_only_slow_is_waited_for(ranks, tmp_path):
    assert ranks(2).run(on_rank_take_long_and_come, runs.folders("llama"), tmp_path / "c") == [1, 1]


def on_rank_load_other_things(paths, what):
    rank, setup = torch.distributed.get_rank(), DistributedSetup.build()
    auto = NeMoAutoModelForCausalLM
    config = transformers.AutoConfig.from_pretrained(paths[0])
    if what == "config":
        config.rms_norm_eps = [1e-6, 0.5][rank]
    if what == "layers":
        config.num_hidden_layers = [3, 2][rank]
    source, load = (paths[rank], auto.from_pretrained) if what == "files" else (config, auto.from_config)
    keywords = {"dtype": [torch.float32, torch.bfloat16][rank]} if what == "keywords" else {}
    start = time.monotonic()
    with pytest.raises(RankError) as caught:
        load(source, distributed_setup=setup, **keywords)
    return str(caught.value), time.monotonic() - start


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("files", "model.safetensors is "),
        ("config", "config.rms_norm_eps is 0.5 on rank 1, but 1e-06 on the others"),
        ("layers", "config.num_hidden_layers is 2 on rank 1, but 3 on the others"),
        ("keywords", 'dtype is "torch.bfloat16" on rank 1, but "torch.float32" on the others'),
    ],
)
def test_ranks_that_load_different_models_are_told_before_they_read(ranks, what, words):
    paths = [checkpoint("llama"), checkpoint("llama", 1)]
    for message, seconds in ranks(2).run(on_rank_load_other_things, paths, what):
        assert message.startswith("the ranks disagree about the model:") and words in message
        assert seconds < SOON


def test_equal_models_in_other_folders_are_equal(ranks, tmp_path):
    shutil.copytree(checkpoint("llama"), tmp_path / "copy")
    assert ranks(2).run(on_rank_load_copies, [checkpoint("llama"), tmp_path / "copy"]) == [True, True]


def on_rank_load_copies(paths):
    rank, setup = torch.distributed.get_rank(), DistributedSetup.build()
    return NeMoAutoModelForCausalLM.from_pretrained(paths[rank], distributed_setup=setup) is not None
