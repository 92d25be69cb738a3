"""A run saved under any topology goes on under any other, bit for bit; at the same one as if it had never stopped."""

import random
from functools import lru_cache

import checkpoint_runs as runs
import pytest
import torch
import transformers

from nemo_dist import DistributedSetup, FSDP2Config, NeMoAutoModelForCausalLM
from nemo_dist.testing.cuda_calls import WithCudaCalls
from nemo_dist.testing.equivalence import Task

# In the order of the world size, as a pool of ranks takes seconds to start.
SAMPLED = [("ddp", 2), ("tp", 2), ("cp", 2), ("pp", 2), ("megatron", 2), ("fsdp2", 4), ("hsdp", 4)]
TOPOLOGIES = [("fsdp2", 1), ("fsdp2", 2), *SAMPLED, ("tp", 4), ("pp", 4), ("ddp", 4), ("hsdp-tp", 8)]
TOPOLOGIES += [("megatron-zero1", 2), ("megatron-tp", 4)]
# A cycle through the sampled ones: each is saved once and loaded once.
SAMPLE = set(zip(SAMPLED, SAMPLED[3:] + SAMPLED[:3], strict=True))
PAIRS = [
    pytest.param(source, target, marks=[] if (source, target) in SAMPLE else [pytest.mark.slow])
    for target in sorted(TOPOLOGIES, key=lambda topology: topology[1])
    for source in TOPOLOGIES
]
KINDS = ["exp_avg", "exp_avg_sq", "model", "step"]
SPECIMEN = "llama-deep-tied"


@pytest.fixture(scope="module")
def on(rank_pools):
    """Run a function on the ranks of a topology, with a stand-in for CUDA where its package calls it."""

    def run(topology, function, *args, **kwargs):
        name, world = topology
        pool = WithCudaCalls(rank_pools(world)) if name.startswith("megatron") else rank_pools(world)
        return pool.run(function, name, *args, **kwargs)

    return run


@pytest.fixture(scope="module")
def saved(on, tmp_path_factory):
    """The same training saved under a topology: where, and everything in it."""
    where = tmp_path_factory.mktemp("saved")

    @lru_cache
    def save(topology):
        path = where / "-".join(map(str, topology))
        return path, runs.joined(on(topology, runs.train_and_save, runs.folders(SPECIMEN), path, SPECIMEN))

    return save


@pytest.fixture(scope="module")
def uninterrupted(on):
    """The losses of steps 3 to 5 of a run that never stopped."""

    @lru_cache
    def losses(topology):
        return on(topology, runs.losses, runs.folders(SPECIMEN), Task(specimen=SPECIMEN), 6)[0][3:]

    return losses


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_any_topology_goes_on_from_any_other(on, saved, uninterrupted, source, target):
    path, expected = saved(source)
    answers = on(target, runs.load_and_report, runs.folders(SPECIMEN), path, SPECIMEN, train=3)
    loaded = runs.joined([found for _, found, _ in answers])
    assert loaded.keys() == expected.keys()
    assert sorted({key.partition("/")[0] for key in loaded}) == KINDS
    assert "model/lm_head.weight" not in loaded
    for key, tensor in expected.items():
        assert torch.equal(loaded[key], tensor), key
    for extra, _, losses in answers:
        assert extra["step"] == 3
        # What was loaded is the source's, whose sums were taken in another order.
        assert losses == pytest.approx(uninterrupted(target), rel=1e-5)


@pytest.mark.parametrize(
    ("source", "target"), [(("tp", 2), ("fsdp2", 4)), (("hsdp", 4), ("tp", 2)), (("tp", 4), ("tp", 2))]
)
def test_packed_projections_are_put_together_right(on, tmp_path, source, target):
    """Tensor parallelism over packed queries, keys and values holds several stretches of a parameter's rows."""
    folders = runs.folders("phi3")
    saved = runs.joined(on(source, runs.train_and_save, folders, tmp_path / "c", "phi3"))
    answers = on(target, runs.load_and_report, folders, tmp_path / "c", "phi3")
    loaded = runs.joined([found for _, found, _ in answers])
    assert any("qkv_proj" in name for name in loaded)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())


@pytest.mark.parametrize(
    ("source", "target"), [(("ep", 2), ("fsdp2", 2)), (("ep", 4), ("ep", 2)), (("fsdp2", 2), ("ep", 4))]
)
def test_experts_go_from_any_mesh_to_any_other(on, tmp_path, source, target):
    folders = runs.folders("mixtral")
    saved = runs.joined(on(source, runs.train_and_save, folders, tmp_path / "c", "mixtral"))
    answers = on(target, runs.load_and_report, folders, tmp_path / "c", "mixtral")
    loaded = runs.joined([found for _, found, _ in answers])
    assert any("experts" in name for name in loaded)
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())


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


def dropout_run(strategy, path, parts):
    """Train in *parts*, each in a new model that loads what the one before saved; dropout, order and schedule drawn."""
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=0.3,
    )
    losses = []
    for index, count in enumerate(parts):
        torch.manual_seed(index)
        setup = DistributedSetup.build(**runs.SETUPS[strategy])
        model = NeMoAutoModelForCausalLM.from_config(config, distributed_setup=setup, dtype=torch.float32)
        runtime = setup.runtime(model.train())
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


@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
def test_a_run_that_stopped_is_bit_for_bit_one_that_never_did(ranks, tmp_path, strategy):
    whole = ranks(2).run(dropout_run, strategy, tmp_path / "a", [6])
    parted = ranks(2).run(dropout_run, strategy, tmp_path / "b", [2, 3, 1])
    for (losses, drawn, state), (other_losses, other_drawn, other_state) in zip(whole, parted, strict=True):
        assert losses == other_losses
        assert drawn == other_drawn
        assert all(torch.equal(other_state[name], tensor) for name, tensor in state.items())


def evaluate_then_save(folders, path):
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


def test_gathered_parameters_after_an_evaluation_neither_hide_the_shards_nor_stay_stale(ranks, tmp_path):
    for before, after, loss in ranks(2).run(evaluate_then_save, runs.folders("llama"), tmp_path / "c"):
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        assert 0 < loss < 100


def asynchronous_run(folders, path):
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
    for expected, loaded in ranks(2).run(asynchronous_run, runs.folders("llama"), tmp_path):
        assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


def grouped(folders, path, group_again):
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
    for found in ranks(2).run(grouped, runs.folders("llama"), tmp_path / "c", True):
        assert [group[:2] for group in found] == [(1e-2, 0.2), (3e-3, 0.0)]


def test_one_group_for_what_was_saved_with_different_options_is_refused(ranks, tmp_path):
    with pytest.raises(Exception, match="saved with different options"):
        ranks(2).run(grouped, runs.folders("llama"), tmp_path / "c", False)


def other_optimizers(folders, path, kind):
    runs.FOLDERS.update(folders)
    setup = DistributedSetup.build(strategy=FSDP2Config(mp_policy=runs.FP32))
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
def test_optimizers_with_other_moments_go_on_too(ranks, tmp_path, kind):
    for (saved, losses), (loaded, losses_after) in ranks(2).run(
        other_optimizers, runs.folders("llama"), tmp_path / "c", kind
    ):
        assert saved.keys() == loaded.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())
        assert losses == losses_after


def save_unpicklable(folders, path, extra):
    runs.FOLDERS.update(folders)
    runtime, optimizer = runs.start("ddp")
    runtime.save(path, optimizer, extra=extra)
    return runtime.load(path, optimizer)


def test_extra_comes_back_as_it_was(ranks, tmp_path):
    extra = {"step": 3, "pair": (1, 2.5), 7: "int key", "blob": b"\x00\xff", "mask": torch.tensor([True, False])}
    (found,) = ranks(1).run(save_unpicklable, runs.folders("llama"), tmp_path / "c", extra)
    assert {k: v for k, v in found.items() if k != "mask"} == {k: v for k, v in extra.items() if k != "mask"}
    assert torch.equal(found["mask"], extra["mask"])


def test_what_only_pickle_could_hold_is_refused_with_its_place(ranks, tmp_path):
    with pytest.raises(Exception, match=r"extra\['deep'\]\[1\] is a Task, which cannot be saved without pickle"):
        ranks(1).run(save_unpicklable, runs.folders("llama"), tmp_path / "c", {"deep": [0, Task()]})
    assert list(tmp_path.iterdir()) == []
