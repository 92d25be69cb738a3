"""What is easily lost on the way into a checkpoint and back: groups, rates, buffers, dtypes, positions in the data."""

import json

import checkpoint_runs as runs
import pytest
import torch
from torch.optim import lr_scheduler

from nemo_dist import CheckpointError, DistributedSetup


def by_name(runtime, optimizer):
    """Return the rate, the decay and the first rate of every local parameter."""
    names = {id(parameter): name for name, parameter in runtime.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"], group["initial_lr"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def two_groups(runtime, decayed_first, rates=(3e-3, 1e-2)):
    plain = [p for name, p in runtime.named_parameters() if p.ndim == 1]
    decayed = [p for name, p in runtime.named_parameters() if p.ndim > 1]
    groups = [{"params": plain, "weight_decay": 0.0, "lr": rates[0]}, {"params": decayed, "lr": rates[1]}]
    return runtime.optimizer(torch.optim.AdamW, groups[::-1] if decayed_first else groups, weight_decay=0.2)


def schedules(optimizer):
    warm = lr_scheduler.LinearLR(optimizer, 0.5, total_iters=2)
    decay = lr_scheduler.CosineAnnealingLR(optimizer, 10)
    return lr_scheduler.SequentialLR(optimizer, [warm, decay], milestones=[2])


def on_rank_train_in_groups(name, folders, path):
    """Train with two groups and a schedule, save; return the rates now and after the next two steps."""
    runs.FOLDERS.update(folders)
    runtime, _ = runs.start(name, "llama-deep")
    optimizer = two_groups(runtime, decayed_first=False)
    scheduler = schedules(optimizer)
    for step in range(3):
        runs.steps(runtime, optimizer, runs.Task(), [step])
        scheduler.step()
    runtime.save(path, optimizer, schedulers=[scheduler])
    return rates_of_the_next_steps(runtime, optimizer, scheduler)


def on_rank_load_in_groups(name, folders, path):
    """Go on with the same groups in another order, made with other rates."""
    runs.FOLDERS.update(folders)
    runtime, _ = runs.start(name, "llama-deep")
    optimizer = two_groups(runtime, decayed_first=True, rates=(5.0, 7.0))
    scheduler = schedules(optimizer)
    runtime.load(path, optimizer, schedulers=[scheduler])
    return rates_of_the_next_steps(runtime, optimizer, scheduler)


def rates_of_the_next_steps(runtime, optimizer, scheduler):
    found = [by_name(runtime, optimizer)]
    for _ in range(2):
        runs.steps(runtime, optimizer, runs.Task(), [3])
        scheduler.step()
        found.append(by_name(runtime, optimizer))
    last = [group["lr"] for group in optimizer.param_groups]
    assert scheduler.get_last_lr() == last
    return found


@pytest.mark.parametrize(
    ("target", "world"), [("ddp", 2), ("pp", 2), pytest.param("hsdp-tp", 8, marks=pytest.mark.slow)]
)
def test_parameters_keep_their_options_and_schedule_in_other_groups(ranks, tmp_path, target, world):
    folders = runs.folders("llama-deep")
    expected = ranks(2).run(on_rank_train_in_groups, "fsdp2", folders, tmp_path / "c")[0]
    answers = ranks(world).run(on_rank_load_in_groups, target, folders, tmp_path / "c")
    for step, rates in enumerate(expected):
        assert runs.joined([answer[step] for answer in answers]) == rates
        assert len(set(rates.values())) == 2


def cyclic(optimizer, rates):
    return lr_scheduler.CyclicLR(optimizer, rates[0], rates[1], cycle_momentum=False)


def on_rank_load_in_one_group(folders, path, rates):
    """Save a schedule with limits per group, and load it into an optimizer with one group."""
    runs.FOLDERS.update(folders)
    runtime, _ = runs.start("fsdp2")
    optimizer = two_groups(runtime, decayed_first=False, rates=(1e-3, 1e-3))
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.1
    scheduler = cyclic(optimizer, rates)
    runtime.save(path, optimizer, schedulers=[scheduler])
    one = runtime.optimizer(torch.optim.AdamW, lr=5.0)
    again = cyclic(one, (5.0, 6.0))
    with torch.no_grad():
        for parameter in runtime.model.parameters():
            parameter.add_(1)
    before = [parameter.to_local().detach().clone() for parameter in runtime.model.parameters()]
    try:
        runtime.load(path, one, schedulers=[again])
    except Exception as error:
        same = map(torch.equal, before, [parameter.to_local() for parameter in runtime.model.parameters()])
        return f"{type(error).__name__}: {error}", all(same)
    scheduler.step()
    again.step()
    return one.param_groups[0]["lr"], optimizer.param_groups[0]["lr"]


def test_scheduler_limits_shared_by_all_groups_load_into_one_group(ranks, tmp_path):
    for found, expected in ranks(2).run(on_rank_load_in_one_group, runs.folders("llama"), tmp_path / "c", (1e-3, 2e-3)):
        assert found == expected != 5.0


def test_scheduler_limits_that_differ_between_groups_are_refused(ranks, tmp_path):
    rates = (1e-3, [2e-3, 4e-3])
    for message, untouched in ranks(2).run(on_rank_load_in_one_group, runs.folders("llama"), tmp_path / "c", rates):
        assert "CyclicLR was saved with max_lrs [0.002, 0.004] for 2 groups of the optimizer, and here are 1" in message
        assert untouched


def odd_state(runtime, optimizer, value):
    """Give the model buffers of every kind, and the moments a wider dtype than the parameters."""
    runtime.model.register_buffer("count", torch.tensor(value))
    runtime.model.register_buffer("mask", torch.arange(5) % 2 == value % 2)
    runtime.model.register_buffer("empty", torch.empty(0, 3))
    runtime.model.register_buffer("cache", torch.full((2,), float(value)), persistent=False)
    for parameter in runtime.model.parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(float(value)),
            "exp_avg": torch.full_like(parameter, value + 2**-15, dtype=torch.float32),
            "exp_avg_sq": torch.full_like(parameter, value + 2**-16, dtype=torch.float32),
        }


def started_in_bf16(name, folders):
    setup = DistributedSetup.build(**runs.SETUPS[name])
    model = runs.SPECIMENS["llama-tied"].load.from_pretrained(
        folders["llama-tied", 0], distributed_setup=setup, dtype=torch.bfloat16
    )
    runtime = setup.runtime(model)
    return runtime, runtime.optimizer(torch.optim.AdamW)


def on_rank_save_odd_state(name, folders, path):
    runtime, optimizer = started_in_bf16(name, folders)
    odd_state(runtime, optimizer, 3)
    runtime.save(path, optimizer)
    return runs.digests(runs.everything(runtime, optimizer))


def on_rank_load_odd_state(name, folders, path):
    runtime, optimizer = started_in_bf16(name, folders)
    odd_state(runtime, optimizer, 4)
    runtime.load(path, optimizer)
    return runs.digests(runs.everything(runtime, optimizer)), runtime.model.cache.tolist()


def test_buffers_scalars_and_wider_moments_come_back_bit_for_bit(ranks, tmp_path):
    folders = runs.folders("llama-tied")
    saved = runs.joined(ranks(2).run(on_rank_save_odd_state, "tp", folders, tmp_path / "c"))
    answers = ranks(2).run(on_rank_load_odd_state, "fsdp2", folders, tmp_path / "c")
    assert runs.joined([found for found, _ in answers]) == saved
    assert {saved[f"model/{name}"].split(" (")[0] for name in ("count", "mask", "empty")} == {
        "torch.int64",
        "torch.bool",
        "torch.float32",
    }
    assert all(text.startswith("torch.float32") for name, text in saved.items() if name.startswith("exp_avg/"))
    assert all(cache == [4.0, 4.0] for _, cache in answers), "a buffer that is not persistent is not the checkpoint's"
    tensors = json.loads((tmp_path / "c" / "manifest.json").read_text())["tensors"]
    assert tensors["model/model.embed_tokens.weight"][1] == "bfloat16"
    assert "model/lm_head.weight" not in tensors and "model/cache" not in tensors


KEPT = {
    "shards": lambda parameter, rank: parameter.to_local().detach().clone(),
    "scales of the shard": lambda parameter, rank: torch.full((3,), float(rank)),
    "a table": lambda parameter, rank: torch.arange(3.0),
}


def on_rank_keep_plain_tensors(folders, path):
    """Save what an optimizer keeps in plain tensors beside DTensors; return what is said, or what comes back."""
    runs.FOLDERS.update(folders)
    runtime, optimizer = runs.start("fsdp2")
    runs.steps(runtime, optimizer, runs.Task(), range(1))
    said = {}
    for index, (what, make) in enumerate(KEPT.items()):
        for parameter in optimizer.state:
            optimizer.state[parameter]["kept"] = make(parameter, runtime.dp_rank)
        try:
            runtime.save(path / str(index), optimizer)
            runtime.load(path / str(index), optimizer)
            said[what] = {tuple(state["kept"].tolist()) for state in optimizer.state.values()}
        except CheckpointError as error:
            said[what] = str(error)
    return said


def test_what_an_optimizer_keeps_apart_on_each_rank_is_refused(ranks, tmp_path):
    for said in ranks(2).run(on_rank_keep_plain_tensors, runs.folders("llama"), tmp_path):
        assert (
            "AdamW keeps 'kept' of model.embed_tokens.weight as a plain tensor of this rank's shard" in said["shards"]
        )
        assert "keeps another kept of lm_head.weight on some ranks" in said["scales of the shard"]
        assert said["a table"] == {(0.0, 1.0, 2.0)}


class Position:
    """Where a data-parallel rank is in its data."""

    def __init__(self, at):
        self.at = at

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def on_rank_save_position(folders, path, each):
    runs.FOLDERS.update(folders)
    runtime, optimizer = runs.start("tp")
    runtime.save(path, optimizer, data=Position(10 + runtime.dp_rank * each))


def on_rank_load_position(name, folders, path):
    runs.FOLDERS.update(folders)
    runtime, optimizer = runs.start(name)
    position = Position(0)
    try:
        runtime.load(path, optimizer, data=position)
    except Exception as error:
        runtime.load(path, optimizer)
        return str(error)
    return position.at


def test_the_position_in_the_data_is_restored_by_dp_rank(ranks, tmp_path):
    """Saved by two pairs of ranks that read the same batches each."""
    folders = runs.folders("llama")
    ranks(4).run(on_rank_save_position, folders, tmp_path / "each", 1)
    ranks(4).run(on_rank_save_position, folders, tmp_path / "same", 0)
    assert ranks(2).run(on_rank_load_position, "fsdp2", folders, tmp_path / "each") == [10, 11]
    assert ranks(2).run(on_rank_load_position, "tp", folders, tmp_path / "same") == [10, 10]
    for message in ranks(2).run(on_rank_load_position, "tp", folders, tmp_path / "each"):
        assert "a different state of data for each of 2 data-parallel ranks, and here are 1; leave data out" in message


def on_rank_forget_one_state(folders, path):
    """Save when one parameter has no state, as if it had never got a gradient; load, and train on."""
    runs.FOLDERS.update(folders)
    runtime, optimizer = runs.start("fsdp2")
    runs.steps(runtime, optimizer, runs.Task(), range(2))
    del optimizer.state[runtime.model.model.norm.weight]
    runtime.save(path, optimizer)
    expected = runs.steps(runtime, optimizer, runs.Task(), range(2, 4))
    runtime, optimizer = runs.start("fsdp2", seed=1)
    runtime.load(path, optimizer)
    found = [len(optimizer.state.get(parameter, ())) for _, parameter in runtime.named_parameters()]
    return found.count(0), set(found), runs.steps(runtime, optimizer, runs.Task(), range(2, 4)) == expected


def test_a_parameter_that_had_no_state_has_none_after_the_load(ranks, tmp_path):
    assert ranks(2).run(on_rank_forget_one_state, runs.folders("llama"), tmp_path / "c") == [(1, {0, 3}, True)] * 2
