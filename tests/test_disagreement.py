"""Ranks that were given different things are told at once: what differs, and on which rank."""

import time

import checkpoint_runs as runs
import pytest
import torch

from nemo_dist import RankError, RunFolder


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
