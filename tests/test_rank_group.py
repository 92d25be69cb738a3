"""Ranks that are some of a process group save, load and export together, without the others."""

import checkpoint_runs as runs
import pytest
import torch
import torch.distributed as dist

from nemo_dist import DistributedSetup, NeMoAutoModelForCausalLM, RunFolder
from nemo_dist.checkpoint.equal_copies import Copies
from nemo_dist.checkpoint.save_plan import Copy, SavePlan
from nemo_dist.errors import CheckpointError, RankError
from nemo_dist.mesh.rank_group import RankGroup

MEMBERS = [1, 3]


def on_rank_save_on_members(folders, path):
    """Save in the foreground and in the background, go on from a run folder, and export; the others do nothing."""
    runs.FOLDERS.update(folders)
    setup = DistributedSetup.build(strategy=runs.FSDP2, ranks=MEMBERS)
    mesh = setup.mesh_context  # all ranks make the mesh
    if dist.get_rank() not in MEMBERS:
        return None
    model = NeMoAutoModelForCausalLM.from_pretrained(folders["llama", 0], distributed_setup=setup, dtype=torch.float32)
    runtime = setup.runtime(model)
    optimizer = runtime.optimizer(torch.optim.AdamW, **runs.OPTIMIZER)
    runs.steps(runtime, optimizer, runs.Task(), range(2))
    saved = runs.digests(runs.everything(runtime, optimizer))
    folder = RunFolder(path / "run")
    folder.save(runtime, optimizer, step=2, extra={"step": 2})
    background = runtime.save(path / "background", optimizer, extra={"step": 2}, asynchronous=True)
    runtime.export(path / "background-export")
    losses = runs.steps(runtime, optimizer, runs.Task(), range(2, 4))
    background.wait()
    assert folder.resume(runtime, optimizer) == (2, {"step": 2})
    assert runs.digests(runs.everything(runtime, optimizer)) == saved
    assert runs.steps(runtime, optimizer, runs.Task(), range(2, 4)) == losses
    assert (RankGroup.of(mesh).size, RankGroup.of(mesh).rank) == (2, MEMBERS.index(dist.get_rank()))
    with pytest.raises((CheckpointError, RankError), match="there is no checkpoint at"):
        runtime.load(path / "none", optimizer)
    return saved


def test_some_of_the_ranks_save_and_any_other_ranks_resume(ranks, tmp_path):
    folders = runs.folders("llama")
    answers = ranks(4).run(on_rank_save_on_members, folders, tmp_path)
    saved = runs.joined([answers[rank] for rank in MEMBERS])
    path = tmp_path / "background"
    assert sorted(file.name for file in path.glob("rank-*")) == ["rank-00000.safetensors", "rank-00001.safetensors"]
    for reports, exported in ranks(2).run(
        runs.on_rank_load_each, "tp", folders, "llama", [path, tmp_path / "run" / "step-00000002"], runs.export_of(path)
    ):
        assert [found for found, _ in reports] == [saved, saved]
        assert exported == {name: text for name, text in saved.items() if name.startswith("model/")}


def on_rank_compare_copies():
    """Compare two copies on the first rank; the other holds nothing."""
    state = {"w": torch.ones(2)} if dist.get_rank() == 0 else {}
    copies = [Copy(name, name, None, replica, 2) for name in state for replica in range(2)]
    found = Copies.of(SavePlan({}, [], replicated=True, copies=copies), state)
    return found.compared, found.compare(RankGroup(), [])


def test_a_rank_that_holds_nothing_takes_part_when_others_compare_copies(ranks):
    """Else the others would wait for it."""
    assert ranks(2).run(on_rank_compare_copies) == [(True, None)] * 2


def on_rank_exchange_with_a_full_device():
    ranks = RankGroup(device=torch.device("meta"))  # in the place of a card, as nothing comes back from there
    mine = torch.full((2,), ranks.rank, dtype=torch.uint8)
    return ranks.exchange([[mine], [mine, mine]], [2, 2] if ranks.first else [4, 4]).tolist()


def test_what_an_export_joins_does_not_go_through_the_device(ranks):
    assert ranks(2).run(on_rank_exchange_with_a_full_device) == [[0, 0, 1, 1], [0, 0, 0, 0, 1, 1, 1, 1]]


def on_rank_find_different_texts(texts):
    return RankGroup().distinct("test", lambda: texts[dist.get_rank()])


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["a" * 9] * 4, [([range(4)], "a" * 9)]),
        (["a", "", "a", ""], [([range(0, 4, 2)], "a"), ([range(1, 5, 2)], "")]),
        (["x", "y", "y", "é"], [([range(1)], "x"), ([range(1, 3)], "y"), ([range(3, 4)], "é")]),
    ],
)
def test_every_rank_learns_each_different_text_and_who_has_it(ranks, texts, expected):
    for found in ranks(4).run(on_rank_find_different_texts, texts):
        assert [([list(r) for r in several], text) for several, text in found] == [
            ([list(r) for r in several], text) for several, text in expected
        ]


def on_rank_fail_to_say():
    def text():
        if dist.get_rank() == 1:
            raise OSError("no room")
        return "x"

    try:
        RankGroup().distinct("looking", text)
    except (CheckpointError, RankError) as error:
        return f"{type(error).__name__}: {error}"


def test_a_rank_that_has_no_text_tells_the_others(ranks):
    first, second = ranks(2).run(on_rank_fail_to_say)
    assert first == "RankError: looking failed on 1 of the ranks:\n- rank 1: CheckpointError: looking failed: no room"
    assert second == "CheckpointError: looking failed: no room"
