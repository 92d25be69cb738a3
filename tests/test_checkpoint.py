"""A run saved under any topology goes on under any other, bit for bit; at the same one as if it had never stopped."""

import random

import checkpoint_runs as runs
import pytest
import torch
from cases import case_id, cases, slow

from nemo_dist import DistributedSetup, NeMoAutoModelForCausalLM, ParallelismSizes
from nemo_dist.mesh.dtensor import local
from nemo_dist.testing.equivalence import Task
from nemo_dist.testing.tiny_models import SPECIMENS


class Feed:
    """Shuffled batches whose position and order can be saved."""

    def __init__(self, rank):
        self.generator = torch.Generator().manual_seed(100 + rank)
        self.taken = 0

    def next(self):
        self.taken += 1
        tokens = torch.randint(1, 90, (4, 12), generator=self.generator)
        return {"input_ids": tokens, "labels": tokens}

    def state_dict(self):
        return {"generator": self.generator.get_state(), "taken": self.taken}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])
        self.taken = state["taken"]


def on_rank_train_in_parts(name, specimen, dropout, path, parts):
    """Train in *parts*, each in a new model that loads what the one before saved; dropout, order and schedule drawn."""
    config = runs.SPECIMENS[specimen].config()
    config.attention_dropout = dropout
    losses = []
    for index, count in enumerate(parts):
        torch.manual_seed(index)
        setup = DistributedSetup.build(**runs.SETUPS[name])
        model = NeMoAutoModelForCausalLM.from_config(config, distributed_setup=setup, dtype=torch.float32)
        model.train()
        runtime = setup.runtime(model)
        optimizer = runtime.optimizer(torch.optim.AdamW, lr=1e-2)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        feed = Feed(runtime.dp_rank + 50 * index)
        if index:
            runtime.load(path, optimizer, schedulers=[scheduler], data=feed)
        else:
            torch.manual_seed(7 + runtime.dp_rank)
        for _ in range(count):
            losses.append(runtime.forward_backward(feed.next()).item())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        runtime.save(path, optimizer, schedulers=[scheduler], data=feed)
    drawn = (torch.rand(3).tolist(), random.random(), feed.taken, scheduler.get_last_lr())
    return losses, drawn, runs.everything(runtime, optimizer)


@cases(
    ("name", "world", "specimen", "dropout"),
    [
        ("fsdp2", 2, "llama", 0.3),
        ("ddp", 2, "llama", 0.3),
        *(
            slow(*cell)
            for cell in (
                ("fsdp2", 1, "llama", 0.3),
                ("hsdp", 4, "llama", 0.3),
                ("cp", 4, "llama", 0.3),
                ("pp", 4, "phi3-deep-tied", 0.3),
                ("ep", 4, "qwen3-moe-deep", 0.3),
                ("tp", 4, "phi3-deep-tied", 0.0),  # tensor parallelism refuses dropout
                ("five", 8, "qwen3-moe-deep", 0.0),
            )
        ),
    ],
    lambda name, world, specimen, dropout: case_id(specimen, world, name, {"dropout": dropout}),
)
def test_a_resumed_run_is_bit_for_bit_an_uninterrupted_one(ranks, tmp_path, name, world, specimen, dropout):
    whole = ranks(world).run(on_rank_train_in_parts, name, specimen, dropout, tmp_path / "a", [6])
    parted = ranks(world).run(on_rank_train_in_parts, name, specimen, dropout, tmp_path / "b", [2, 3, 1])
    for (losses, drawn, state), (other_losses, other_drawn, other_state) in zip(whole, parted, strict=True):
        assert losses == other_losses
        assert drawn == other_drawn
        assert state.keys() == other_state.keys()
        assert all(torch.equal(other_state[name], tensor) for name, tensor in state.items())


def on_rank_evaluate_then_save(folders, path):
    runs.FOLDERS.update(folders)
    runtime, optimizer = runs.start("fsdp2")
    runs.steps(runtime, optimizer, Task(), range(1))
    before = runs.everything(runtime, optimizer)
    with torch.no_grad():
        runtime.model(**Task(rows=2).batches(0)[0])
    runtime.save(path, optimizer)
    with torch.no_grad():
        for parameter in runtime.model.parameters():
            parameter.zero_()
        runtime.model(**Task(rows=2).batches(0)[0])
    runtime.load(path, optimizer)
    with torch.no_grad():
        loss = runtime.model(**Task(rows=2).batches(0)[0]).loss.item()
    return before, runs.everything(runtime, optimizer), loss


def test_saving_and_loading_after_an_evaluation_use_the_shards(ranks, tmp_path):
    for before, after, loss in ranks(2).run(on_rank_evaluate_then_save, runs.folders("llama"), tmp_path / "c"):
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        assert 0 < loss < 100


def on_rank_save_in_background(folders, path):
    """Change everything while the save is under way; what is saved is what was there at the call."""
    runs.FOLDERS.update(folders)
    runtime, optimizer = runs.start("fsdp2")
    task = Task()
    runs.steps(runtime, optimizer, task, range(2))
    expected = runs.everything(runtime, optimizer)
    first = runtime.save(path / "first", optimizer, extra={"step": 2}, asynchronous=True)
    runs.steps(runtime, optimizer, task, range(2, 4))
    second = runtime.save(path / "second", optimizer, extra={"step": 4}, asynchronous=True)
    assert first.done()
    second.wait()
    runtime.load(path / "first", optimizer)
    return expected, runs.everything(runtime, optimizer)


def test_an_asynchronous_save_has_the_state_at_the_call(ranks, tmp_path):
    for expected, loaded in ranks(2).run(on_rank_save_in_background, runs.folders("llama"), tmp_path):
        assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


def on_rank_load_into_groups(folders, path, group_again):
    """Save with two groups of options, and load into an optimizer that groups in another order."""
    runs.FOLDERS.update(folders)
    runtime, _ = runs.start("fsdp2")
    plain = [p for name, p in runtime.named_parameters() if p.ndim == 1]
    decayed = [p for name, p in runtime.named_parameters() if p.ndim > 1]
    groups = [{"params": plain, "weight_decay": 0.0, "lr": 3e-3}, {"params": decayed, "weight_decay": 0.2}]
    optimizer = runtime.optimizer(torch.optim.AdamW, groups, lr=1e-2)
    runs.steps(runtime, optimizer, Task(), range(1))
    runtime.save(path, optimizer)
    groups = groups[::-1] if group_again else [{"params": [*plain, *decayed]}]
    again = runtime.optimizer(torch.optim.AdamW, [{"params": group["params"]} for group in groups], lr=5.0)
    runtime.load(path, again)
    return [(group["lr"], group["weight_decay"], len(group["params"])) for group in again.param_groups]


def test_options_follow_their_parameters_into_other_groups(ranks, tmp_path):
    for found in ranks(2).run(on_rank_load_into_groups, runs.folders("llama"), tmp_path / "c", True):
        assert [group[:2] for group in found] == [(1e-2, 0.2), (3e-3, 0.0)]


def test_merging_groups_with_different_options_is_refused(ranks, tmp_path):
    with pytest.raises(Exception, match="saved with different options"):
        ranks(2).run(on_rank_load_into_groups, runs.folders("llama"), tmp_path / "c", False)


def on_rank_train_save_and_load(folders, path, kind):
    runs.FOLDERS.update(folders)
    setup = DistributedSetup.build(strategy=runs.FSDP2)
    results = []
    for seed in (0, 1):
        model = runs.SPECIMENS["llama"].load.from_pretrained(
            runs.checkpoint_of("llama", seed), distributed_setup=setup, dtype=torch.float32
        )
        runtime = setup.runtime(model)
        optimizer = runtime.optimizer(getattr(torch.optim, kind), **({"momentum": 0.9} if kind == "SGD" else {}))
        if seed == 0:
            runs.steps(runtime, optimizer, Task(), range(2))
            runtime.save(path, optimizer)
        else:
            runtime.load(path, optimizer)
        results.append((runs.everything(runtime, optimizer), runs.steps(runtime, optimizer, Task(), range(2, 4))))
    return results


@pytest.mark.parametrize("kind", ["SGD", "Adagrad", "RMSprop", "NAdam"])
def test_other_optimizers_are_saved_and_loaded_too(ranks, tmp_path, kind):
    for (saved, losses), (loaded, losses_after) in ranks(2).run(
        on_rank_train_save_and_load, runs.folders("llama"), tmp_path / "c", kind
    ):
        assert saved.keys() == loaded.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())
        assert losses == losses_after


def on_rank_save_extra(folders, path, extra):
    runs.FOLDERS.update(folders)
    runtime, optimizer = runs.start("ddp")
    runtime.save(path, optimizer, extra=extra)
    return runtime.load(path, optimizer)


def test_extra_comes_back_as_it_was(ranks, tmp_path):
    extra = {"step": 3, "pair": (1, 2.5), 7: "int key", "blob": b"\x00\xff", "mask": torch.tensor([True, False])}
    (found,) = ranks(1).run(on_rank_save_extra, runs.folders("llama"), tmp_path / "c", extra)
    assert {k: v for k, v in found.items() if k != "mask"} == {k: v for k, v in extra.items() if k != "mask"}
    assert torch.equal(found["mask"], extra["mask"])


def test_extra_that_would_need_pickle_is_refused_with_its_path(ranks, tmp_path):
    with pytest.raises(Exception, match=r"extra\['deep'\]\[1\] is a Task, which cannot be saved without pickle"):
        ranks(1).run(on_rank_save_extra, runs.folders("llama"), tmp_path / "c", {"deep": [0, Task()]})
    assert list(tmp_path.iterdir()) == []


def on_rank_train_narrow(folder, path, sizes):
    """Train, save, go on and load; return the elements on this rank of the narrowest weight, and all that was saved."""
    setup = DistributedSetup.build(strategy=runs.FSDP2, parallelism_sizes=ParallelismSizes(**sizes))
    model = NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    runtime = setup.runtime(model)
    optimizer = runtime.optimizer(torch.optim.AdamW, **runs.OPTIMIZER)
    runs.steps(runtime, optimizer, runs.Task(), range(2))
    runtime.save(path, optimizer)
    saved = runs.everything(runtime, optimizer)
    runs.steps(runtime, optimizer, runs.Task(), range(2, 3))
    runtime.load(path, optimizer)
    assert runs.digests(runs.everything(runtime, optimizer)) == runs.digests(saved)
    return local(model.get_parameter("model.layers.0.mlp.up_proj.weight")).numel(), saved


@pytest.mark.slow
def test_ranks_that_hold_nothing_of_a_weight_load_train_and_save(ranks, tmp_path):
    """Thousands of data-parallel ranks share the rows that tensor parallelism leaves of a small matrix; here one."""
    config = SPECIMENS["llama"].config()
    config.intermediate_size = 2
    torch.manual_seed(0)
    SPECIMENS["llama"].load.from_config(config).save_pretrained(tmp_path / "model")
    ((_, expected),) = ranks(1).run(on_rank_train_narrow, tmp_path / "model", tmp_path / "one", {})
    found = ranks(4).run(on_rank_train_narrow, tmp_path / "model", tmp_path / "four", {"tp_size": 2})
    assert [held for held, _ in found] == [config.hidden_size, config.hidden_size, 0, 0]
    for _, saved in found:
        assert saved.keys() == expected.keys()
        for name, tensor in saved.items():
            assert (tensor - expected[name]).norm() <= 1e-5 * expected[name].norm(), name
