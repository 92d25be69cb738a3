"""A rank that fails, or stops taking part, is named by the ranks that wait for it, and soon."""

import os
import subprocess
import sys
import textwrap
import time

import checkpoint_runs as runs
import pytest
import torch
import torch.distributed as dist
from cases import cases, slow
from scripts import START
from test_launchers import clean, free_port

from nemo_dist import RankError
from nemo_dist.mesh.rank_status import explained, tell_uncaught
from nemo_dist.testing.pool import RankPool


def on_rank_wait_at_a_meeting(folders, path, how):
    """The second rank fails in its step, which the other does not take, and does not come to the save."""
    runs.FOLDERS.update(folders)
    runtime, optimizer = runs.start("fsdp2")
    start = time.monotonic()
    if dist.get_rank() == 1:
        if how == "raises":
            with pytest.raises(ValueError, match="has no labels"):
                runtime.forward_backward({"input_ids": torch.ones(1, 4, dtype=torch.long)})
        else:  # as the interpreter ends
            tell_uncaught()
            sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
        time.sleep(15)
        return "", 0.0
    with pytest.raises(RankError) as caught:
        runtime.save(path, optimizer)
    return str(caught.value), time.monotonic() - start


@cases(
    ("how", "words"),
    [
        ("raises", "rank 1 failed in step 1: ValueError: the batch has no labels"),
        slow("is interrupted", "rank 1 failed in step 0: KeyboardInterrupt"),
    ],
    lambda how, _: how,
)
def test_a_rank_that_waits_at_a_save_names_the_one_that_failed(tmp_path, how, words):
    with RankPool(2) as pool:  # of its own, as its ranks have not come to the same meetings in the end
        (message, seconds), _ = pool.run(on_rank_wait_at_a_meeting, runs.folders("llama"), tmp_path / "c", how)
    assert "ranks failed while this one waited for them at 'collecting the state of the run'" in message
    assert words in message
    assert seconds < 50  # far below the half hour that ranks wait for each other


def on_rank_go_on(folders, path):
    """Fail on both ranks, go on, and meet late: what was caught is forgotten."""
    runs.FOLDERS.update(folders)
    runtime, optimizer = runs.start("fsdp2")
    with pytest.raises(ValueError):
        runtime.forward_backward({"input_ids": torch.ones(1, 4, dtype=torch.long)})
    runs.steps(runtime, optimizer, runs.Task(), range(1))
    if dist.get_rank() == 1:
        time.sleep(8)
    runtime.save(path, optimizer)
    return True


def test_an_error_that_was_caught_is_no_reason_to_give_up_on_a_rank(ranks, tmp_path):
    assert ranks(2).run(on_rank_go_on, runs.folders("llama"), tmp_path / "c") == [True, True]


LOSE = (
    START
    + """
    what, folder = sys.argv[1:]
    env, runtime, optimizer = start(timeout_minutes=0.15)
    for step in range(3 - env.rank):
        if what == "user code" and env.rank == 1 and step == 1:
            {}["the users key"]
        if what == "ends" and env.rank == 1 and step == 1:
            sys.exit()
        train(runtime, optimizer)
    runtime.save(folder, optimizer)
"""
)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        slow("user code", ["rank 1 failed in step 1: KeyError: 'the users key'"]),
        slow("ends", ["rank 1 failed in step 1: its program came to its end, or called sys.exit"]),
        slow(
            "uneven",
            [
                "RankError: step 3 lost another rank",
                "rank 0 trains on, in step 3, and rank 1 waits at 'collecting the state of the run' after step 2",
            ],
        ),
    ],
    ids=["user code", "ends", "uneven"],
)
def test_ranks_that_lose_another_say_which_and_why(tmp_path, what, words):
    """Without a launcher that would end the others at once."""
    (tmp_path / "lose.py").write_text(textwrap.dedent(LOSE))
    command = [sys.executable, tmp_path / "lose.py", what, tmp_path / "c"]
    meet = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            command, env=clean() | meet | {"RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True
        )
        for rank in ("0", "1")
    ]
    errors = [rank.communicate(timeout=300)[1] for rank in ranks]  # far below that half hour, too
    assert ranks[0].returncode
    for text in words:
        assert text in errors[0], errors[0][-5000:]
    assert not os.path.exists(tmp_path / "c")


def test_errors_of_one_process_stay_what_they_are():
    with pytest.raises(RuntimeError, match=r"^Connection closed by peer$"), explained():
        raise RuntimeError("Connection closed by peer")
