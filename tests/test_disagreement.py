"""Ranks that were given different things are told at once: what differs, and on which rank."""

import shutil
import time

import checkpoint_runs as runs
import pytest
import torch
import transformers

from nemo_dist import DistributedSetup, NeMoAutoModelForCausalLM, RankError, RunFolder
from nemo_dist.testing.equivalence import checkpoint


def on_rank_disagree(folders, path, what):
    runs.FOLDERS.update(folders)
    rank = torch.distributed.get_rank()
    runtime, optimizer = runs.start("fsdp2")
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    calls = {
        "path": lambda: runtime.save(f"{path}/{rank}", optimizer),
        "step": lambda: RunFolder(path).save(runtime, optimizer, step=1 + rank),
        "extra": lambda: runtime.save(path, optimizer, extra={"epoch": rank}),
        "long extra": lambda: runtime.save(path, optimizer, extra=["x"] * 100 + [rank]),
        "a scheduler": lambda: runtime.save(path, optimizer, schedulers=[scheduler][rank:]),
        "an optimizer": lambda: runtime.save(path, [optimizer, None][rank]),
        "another optimizer": lambda: runtime.save(
            path, [optimizer, torch.optim.SGD(runtime.model.parameters(), momentum=0.9)][rank]
        ),
        "the type": lambda: runtime.optimizer([torch.optim.AdamW, torch.optim.SGD][rank], lr=1e-3),
        "the rate": lambda: runtime.optimizer(torch.optim.AdamW, lr=[0.1, 0.01][rank]),
        "betas": lambda: runtime.optimizer(torch.optim.AdamW, betas=[(0.9, 0.95), (0.9, 0.99)][rank]),
    }
    start = time.monotonic()
    with pytest.raises(RankError) as caught:
        calls[what]()
    return str(caught.value), time.monotonic() - start


EXPECTED = {
    "path": "path is ",
    "step": "step is 2 on rank 1, but 1 on the others",
    "extra": 'extra is {"epoch": 1} on rank 1, but {"epoch": 0} on the others',
    "long extra": "... (",
    "a scheduler": "schedulers is [] on rank 1, but ",
    "an optimizer": 'optimizer is null on rank 1, but "AdamW" on the others',
    "another optimizer": 'optimizer is "SGD" on rank 1, but "AdamW" on the others',
    "the type": "type is torch.optim.sgd.SGD on rank 1, but torch.optim.adamw.AdamW on the others",
    "the rate": "lr is 0.01 on rank 1, but 0.1 on the others",
    "betas": "betas is (0.9, 0.99) on rank 1, but (0.9, 0.95) on the others",
}


@pytest.mark.parametrize("what", EXPECTED)
def test_ranks_that_differ_are_told_at_once(ranks, tmp_path, what):
    answers = ranks(2).run(on_rank_disagree, runs.folders("llama"), tmp_path / "c", what)
    for message, seconds in answers:
        assert EXPECTED[what] in message
        assert seconds < 20
    assert not list(tmp_path.iterdir())


def on_rank_load_other_things(paths, what):
    rank, setup = torch.distributed.get_rank(), DistributedSetup.build()
    auto = NeMoAutoModelForCausalLM
    config = transformers.AutoConfig.from_pretrained(paths[0])
    if what == "config":
        config.rms_norm_eps = [1e-6, 0.5][rank]
    if what == "layers":
        config.num_hidden_layers = [3, 2][rank]
    source, load = (paths[rank], auto.from_pretrained) if what == "files" else (config, auto.from_config)
    start = time.monotonic()
    with pytest.raises(RankError) as caught:
        load(source, distributed_setup=setup)
    return str(caught.value), time.monotonic() - start


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("files", "model.safetensors is "),
        ("config", "config.rms_norm_eps is 0.5 on rank 1, but 1e-06 on the others"),
        ("layers", "config.num_hidden_layers is 2 on rank 1, but 3 on the others"),
    ],
)
def test_ranks_that_load_different_models_are_told_before_they_read(ranks, what, words):
    paths = [checkpoint("llama"), checkpoint("llama", 1)]
    for message, seconds in ranks(2).run(on_rank_load_other_things, paths, what):
        assert message.startswith("the ranks disagree about the model:") and words in message
        assert seconds < 20


def test_equal_models_in_other_folders_are_equal(ranks, tmp_path):
    shutil.copytree(checkpoint("llama"), tmp_path / "copy")
    assert ranks(2).run(on_rank_load_copies, [checkpoint("llama"), tmp_path / "copy"]) == [True, True]


def on_rank_load_copies(paths):
    rank, setup = torch.distributed.get_rank(), DistributedSetup.build()
    return NeMoAutoModelForCausalLM.from_pretrained(paths[rank], distributed_setup=setup) is not None
