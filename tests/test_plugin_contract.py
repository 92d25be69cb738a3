"""The contract of a plugin, point by point, with a package that comes from elsewhere (tests/outside)."""

import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from nemo_dist import (
    DDPConfig,
    DistributedSetup,
    FSDP2Config,
    MeshPlan,
    ParallelismSizes,
    PipelineConfig,
    PluginError,
    Registry,
    Role,
    TopologyError,
)
from nemo_dist.testing.equivalence import Task, assert_equivalent, checkpoint, differences, merged, reference, train
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.tensors import whole
from nemo_dist.testing.tiny_models import SPECIMENS

OUTSIDE = str(Path(__file__).parent / "outside")
LLAMA = SPECIMENS["llama"].load
FSDP2 = FSDP2Config(mp_policy=FP32)


@pytest.fixture(scope="module", autouse=True)
def installed():
    """Install the package as pip would: its modules and its entry points are found on the path, also by ranks."""
    sys.path.insert(0, OUTSIDE)
    yield
    sys.path.remove(OUTSIDE)


def options(*plugins, strategy=FSDP2, **sizes):
    return {"strategy": strategy, "plugins": plugins, "parallelism_sizes": ParallelismSizes(**sizes)}


def load(*plugins, **more):
    setup = DistributedSetup.build(**options(*plugins, **more))
    return setup, LLAMA.from_pretrained(checkpoint("llama"), distributed_setup=setup, dtype=torch.float32)


# ---- 1. one engine, one presenter ----


def on_rank_two_engines(folder, names):
    setup = DistributedSetup.build(**options(*names))
    model = LLAMA.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    with pytest.raises(PluginError) as caught:
        setup.runtime(model)
    return str(caught.value)


def test_a_second_engine_is_refused_by_name(ranks):
    for message in ranks(2).run(on_rank_two_engines, checkpoint("llama"), ("runner", "second_runner")):
        assert (
            "plugins 'runner' and 'second_runner' both give an engine" in message and "leave one of them out" in message
        )


def test_one_engine_of_an_outside_plugin_trains_like_one_process(ranks):
    assert_equivalent(ranks(2), Task(), **options("runner"))


def on_rank_two_presenters(folder):
    setup = DistributedSetup.build(**options("presenter", "second_presenter"))
    with pytest.raises(PluginError) as caught:
        LLAMA.from_pretrained(folder, distributed_setup=setup)
    return str(caught.value)


def test_a_second_presenter_is_refused_by_name(ranks):
    for message in ranks(2).run(on_rank_two_presenters, checkpoint("llama")):
        assert "plugins 'presenter' and 'second_presenter' both answer present(), which only one may" in message


# ---- 2. forwards that plugins change ----


def on_rank_count_forwards(folder, build):
    from nemo_dist_outside import CALLS

    setup = DistributedSetup.build(**build)
    model = LLAMA.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    counts = []
    for training in (False, True):
        model.train(training)
        runtime = setup.runtime(model)
        CALLS.clear()
        (batch,) = Task().batches(0)
        runtime.forward_backward({name: value.chunk(runtime.dp_size)[runtime.dp_rank] for name, value in batch.items()})
        counts.append(len(CALLS))
    return counts


@pytest.mark.parametrize(
    ("build", "times"),
    [
        ({}, 1),
        ({"activation_checkpointing": True}, 2),
        ({"activation_checkpointing": "selective"}, 2),
        ({"parallelism_sizes": ParallelismSizes(tp_size=2)}, 1),
        ({"parallelism_sizes": ParallelismSizes(tp_size=2), "activation_checkpointing": True}, 2),
        ({"strategy": DDPConfig(), "activation_checkpointing": True}, 2),
    ],
    ids=["fsdp2", "recompute", "selective recompute", "tp", "tp and recompute", "ddp and recompute"],
)
def test_the_forward_that_a_plugin_set_runs_under_every_other(ranks, build, times):
    layers = SPECIMENS["llama"].config().num_hidden_layers

    for counts in ranks(2).run(on_rank_count_forwards, checkpoint("llama"), options("counted") | build):
        assert counts == [layers * times] * 2


def test_a_changed_forward_is_exact_under_recomputation_and_tp(ranks):
    assert_equivalent(ranks(2), Task(), **options("counted", tp_size=2), activation_checkpointing=True)


def on_rank_pipeline_after_a_forward_was_changed(folder):
    from nemo_dist_outside import Counted

    class Earlier(Counted):
        stage = 5

    build = {"strategy": FSDP2, "parallelism_sizes": ParallelismSizes(pp_size=2), "plugins": (Earlier(),)}
    with pytest.raises(ValueError, match="have a forward of their own beside that of their class") as caught:
        LLAMA.from_pretrained(folder, distributed_setup=DistributedSetup.build(**build))
    return str(caught.value)


def test_a_pipeline_refuses_forwards_that_its_stages_would_share(ranks):
    for message in ranks(2).run(on_rank_pipeline_after_a_forward_was_changed, checkpoint("llama")):
        assert "give that a stage after Stage.SPLIT" in message


# ---- 3. wrappers in the place of parts ----

WRAPPED = {
    "in shard, under fsdp2": options("wrapped_early"),
    "in shard, under ddp": options("wrapped_early", strategy=DDPConfig()),
    "in wrap, as a strategy": {"strategy": "wrapped"},
}


def on_rank_train_from_config(task, build):
    torch.manual_seed(7)
    setup = DistributedSetup.build(**build)
    model = LLAMA.from_config(SPECIMENS["llama"].config(), distributed_setup=setup, dtype=torch.float32)
    return train(task, setup, model)


@pytest.mark.parametrize("build", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_wrapped_model_loads_and_trains_like_one_process(ranks, build, accumulate):
    assert_equivalent(ranks(2), Task(accumulate=accumulate), **build)


@pytest.mark.parametrize("build", WRAPPED.values(), ids=WRAPPED)
def test_a_wrapped_new_model_trains_like_a_bare_one(ranks, build):
    task = Task()
    expected = merged(ranks(2).run(on_rank_train_from_config, task, {"strategy": DDPConfig()}))
    found = merged(ranks(2).run(on_rank_train_from_config, task, build))

    assert differences(found, expected) == []


def on_rank_save_wrapped(folder, target, build):
    setup = DistributedSetup.build(**build)
    model = LLAMA.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    runtime = setup.runtime(model)
    optimizer = runtime.optimizer(torch.optim.AdamW, lr=1e-2)
    for step in range(2):
        (batch,) = Task().batches(step)
        runtime.forward_backward({name: value.chunk(runtime.dp_size)[runtime.dp_rank] for name, value in batch.items()})
        optimizer.step()
        optimizer.zero_grad()
    runtime.save(target / "run", optimizer)
    runtime.export(target / "exported")
    return {name: whole(parameter) for name, parameter in runtime.named_parameters()}


def on_rank_load_bare(folder, target):
    setup = DistributedSetup.build(strategy=FSDP2, parallelism_sizes=ParallelismSizes(tp_size=2))
    runtime = setup.runtime(LLAMA.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32))
    runtime.load(target / "run", runtime.optimizer(torch.optim.AdamW, lr=1e-2))
    return {name: whole(parameter) for name, parameter in runtime.named_parameters()}


@pytest.mark.parametrize("build", WRAPPED.values(), ids=WRAPPED)
def test_a_wrapped_model_is_saved_under_the_names_of_the_model(ranks, build, tmp_path):
    trained, _ = ranks(2).run(on_rank_save_wrapped, checkpoint("llama"), tmp_path, build)
    loaded, _ = ranks(2).run(on_rank_load_bare, checkpoint("llama"), tmp_path)
    exported = LLAMA.from_pretrained(tmp_path / "exported", dtype=torch.float32)
    names = {name for name, _ in SPECIMENS["llama"].make().named_parameters()}

    assert trained.keys() == loaded.keys() == names
    assert all(torch.equal(trained[name], loaded[name]) for name in names)
    assert all(torch.equal(trained[name], exported.get_parameter(name)) for name in names)


def on_rank_lose_the_model(folder, how):
    from nemo_dist import hookimpl
    from nemo_dist_outside import WrappedEarly

    class Losing(WrappedEarly):
        @hookimpl
        def shard(self, parts):
            if how == "lost":
                parts[:] = [SPECIMENS["llama"].make()]
            else:
                parts[0].scale = torch.nn.Parameter(torch.ones(1))
                holder = torch.nn.Module()
                holder.model, holder.own = parts[0], torch.nn.Parameter(torch.ones(1))
                parts[:] = [holder]

    setup = DistributedSetup.build(strategy=DDPConfig(), plugins=(Losing(),))
    with pytest.raises(PluginError) as caught:
        LLAMA.from_pretrained(folder, distributed_setup=setup)
    return str(caught.value)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("lost", "plugin 'wrapped_early': shard() replaced LlamaForCausalLM by a module that does not hold it"),
        ("foreign", "plugin 'wrapped_early': shard() left parameters outside of the model (own)"),
    ],
)
def test_a_plugin_that_loses_the_model_is_named(ranks, how, message):
    for said in ranks(2).run(on_rank_lose_the_model, checkpoint("llama"), how):
        assert message in said


# ---- 4. axes of its own ----


@pytest.mark.parametrize(
    ("plugin", "axis", "names", "readers"),
    [
        ("split_labels", "labels", ("pp", "dp_replicate", "dp_shard", "cp", "labels", "tp"), (0, 1)),
        ("sharing", "sharing", ("pp", "dp_replicate", "dp_shard", "cp", "tp", "sharing"), (0, 1)),
        ("islands", "islands", ("pp", "islands", "dp_replicate", "dp_shard", "cp", "tp"), (0,)),
    ],
)
def test_an_axis_with_a_role_takes_ranks_of_the_dense_mesh(plugin, axis, names, readers):
    setup = DistributedSetup.build(**options(plugin, extra={axis: 2}), world_size=4)
    role = dict(zip(("split_labels", "sharing", "islands"), (Role.SEQUENCE, Role.PARAMETERS, Role.BATCH), strict=True))[
        plugin
    ]

    assert setup.plan.dense.names == names
    assert setup.plan.splitting(role) == 2 * (2 if role is Role.BATCH else 1)
    assert setup.plan.splitting(Role.TOKENS) == (2 if role is Role.PARAMETERS else 4)
    assert setup.plan.batch_ranks(0) == readers
    assert setup.plan.size("dp") == (4 if role is Role.BATCH else 2)


def test_an_axis_that_nobody_claims_is_refused_and_a_default_plugin_is_taken():
    taken = DistributedSetup.build(
        strategy=FSDP2, parallelism_sizes=ParallelismSizes(extra={"labels": 2}), world_size=4
    )
    assert [plugin.name for plugin in taken.plugins] == ["split_labels", "fsdp2"]

    with pytest.raises(TopologyError, match="axis 'islands' has size 2"):
        DistributedSetup.build(**options(extra={"islands": 2}), world_size=4)


def test_sizes_that_do_not_multiply_out_name_the_axis_of_the_plugin():
    with pytest.raises(TopologyError, match=r"pp_size \* cp_size \* tp_size \* labels = 1 \* 1 \* 2 \* 3 = 6"):
        DistributedSetup.build(**options("split_labels", tp_size=2, extra={"labels": 3}), world_size=8)


def test_a_role_for_an_axis_of_ours_is_refused():
    from nemo_dist_outside import SplitLabels

    class Thief(SplitLabels):
        axes, roles = frozenset({"cp"}), {"cp": Role.BATCH}

    with pytest.raises(TopologyError, match="declares a role for axis 'cp', which is not an axis of its own"):
        DistributedSetup.build(**options(Thief(), cp_size=2), world_size=4)


AXES = {
    "a split sequence": (2, options("split_labels", extra={"labels": 2})),
    "a split sequence and data": (4, options("split_labels", extra={"labels": 2})),
    "a split sequence under ddp": (4, options("split_labels", strategy=DDPConfig(), extra={"labels": 2})),
    "a split sequence and replicas": (8, options("split_labels", dp_replicate_size=2, extra={"labels": 2})),
    "a split sequence beside tp": (4, options("split_labels", tp_size=2, extra={"labels": 2})),
    "a shared batch": (4, options("sharing", extra={"sharing": 2})),
    "a shared batch under ddp": (4, options("sharing", strategy=DDPConfig(), extra={"sharing": 2})),
    "islands": (4, options("islands", extra={"islands": 2})),
    "islands and replicas": (8, options("islands", dp_replicate_size=2, extra={"islands": 2})),
    "islands under ddp": (4, options("islands", strategy=DDPConfig(), extra={"islands": 2})),
    "islands and a split sequence": (4, options("islands", "split_labels", extra={"islands": 2, "labels": 2})),
}


@pytest.mark.parametrize(("world", "build"), AXES.values(), ids=AXES)
def test_an_outside_axis_trains_like_one_process(ranks, world, build):
    assert_equivalent(ranks(world), Task(), **build)


def test_an_outside_axis_accumulates_like_one_process(ranks):
    assert_equivalent(ranks(4), Task(accumulate=3), **options("split_labels", extra={"labels": 2}))


def test_a_plan_is_the_same_for_ranks_that_only_plan():
    sizes = ParallelismSizes(tp_size=2, extra={"labels": 2}).with_roles({"labels": Role.SEQUENCE})
    built = DistributedSetup.build(**options("split_labels", tp_size=2, extra={"labels": 2}), world_size=16)

    assert MeshPlan.resolve(sizes, 16) == built.plan


# ---- 5. state, and a part in the backward, the norm, zero_grad and the end ----


def test_a_scaled_loss_trains_like_one_process(ranks):
    assert_equivalent(ranks(2), Task(accumulate=2), **options("scaled"))


def test_a_scaled_loss_trains_a_pipeline_like_one_process(ranks):
    build = options("scaled", pp_size=2) | {"pipeline_config": PipelineConfig(pp_microbatch_size=2)}
    assert_equivalent(ranks(2), Task(), **build)


def on_rank_train_with_state(folder, target, build, seed):
    runtime, optimizer, events = started(folder, build)
    for step in range(2):
        (batch,) = Task(seed=seed).batches(step)
        runtime.forward_backward({name: value.chunk(runtime.dp_size)[runtime.dp_rank] for name, value in batch.items()})
        runtime.clip_grad_norm_(0.5)
        optimizer.step()
        optimizer.zero_grad()
    runtime.save(target, optimizer)
    averages = {name: whole(tensor) for name, tensor in runtime.plugins["scaled"].state.tensors()["average"].items()}
    runtime.close()
    return averages, list(events)


def started(folder, build):
    setup = DistributedSetup.build(**build)
    model = LLAMA.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    runtime = setup.runtime(model)
    return runtime, runtime.optimizer(torch.optim.AdamW, lr=1e-2), runtime.plugins["scaled"].close.func.__self__


def on_rank_load_state(folder, target, build):
    runtime, optimizer, events = started(folder, build)
    runtime.load(target, optimizer)
    state = runtime.plugins["scaled"].state
    tensors = state.tensors()["average"]
    like = {name: type(parameter) for name, parameter in runtime.named_parameters()}
    assert all(
        isinstance(tensor, DTensor) == (like[name] is not torch.nn.Parameter) for name, tensor in tensors.items()
    )
    return {name: whole(tensor) for name, tensor in tensors.items()}, state.shared(), list(events)


HERE = options("scaled")
OTHERS = {
    "the same": HERE,
    "tp": options("scaled", tp_size=2),
    "ddp": options("scaled", strategy=DDPConfig()),
    "pp": options("scaled", pp_size=2) | {"pipeline_config": PipelineConfig(pp_microbatch_size=2)},
}


@pytest.mark.parametrize("build", OTHERS.values(), ids=OTHERS)
def test_the_state_of_a_plugin_is_restored_under_any_topology(ranks, build, tmp_path):
    (saved, events), _ = ranks(2).run(on_rank_train_with_state, checkpoint("llama"), tmp_path / "run", HERE, 0)
    assert events == ["before_clip", "zero_grad", "before_clip", "zero_grad", "close"]

    found = {}
    for tensors, shared, seen in ranks(2).run(on_rank_load_state, checkpoint("llama"), tmp_path / "run", build):
        found |= tensors
        assert shared == {"steps": 2} and seen == ["loaded of rank None"]
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], saved[name]) for name in saved)


def scaled(**fields):
    from nemo_dist_outside import Scaled

    return Scaled(Scaled.config_type(**fields))


def on_rank_own_state(folder, target, sizes):
    build = options(scaled(of_rank=True), **sizes)
    if not sizes:
        on_rank_train_with_state(folder, target, build, 0)
        return on_rank_load_state(folder, target, build)[2]
    with pytest.raises(Exception, match="it keeps state of its own on every rank, and the topology is another one"):
        on_rank_load_state(folder, target, build)
    return None


def test_state_of_each_rank_is_restored_on_the_same_topology_only(ranks, tmp_path):
    same = ranks(2).run(on_rank_own_state, checkpoint("llama"), tmp_path / "run", {})
    assert same == [["loaded of rank 0"], ["loaded of rank 1"]]

    ranks(2).run(on_rank_own_state, checkpoint("llama"), tmp_path / "run", {"tp_size": 2})


def on_rank_save_unequal_state(folder, target):
    runtime, optimizer, _ = started(folder, HERE)
    runtime.plugins["scaled"].state.load.__self__.steps = torch.distributed.get_rank()
    with pytest.raises(Exception, match="plugin 'scaled' calls its state equal on every rank, but that of rank"):
        runtime.save(target, optimizer)
    return target.exists()


def test_state_that_should_be_equal_and_is_not_fails_the_save(ranks, tmp_path):
    assert ranks(2).run(on_rank_save_unequal_state, checkpoint("llama"), tmp_path / "run") == [False, False]


def on_rank_load_without_the_plugin(folder, target):
    setup = DistributedSetup.build(strategy=FSDP2)
    runtime = setup.runtime(LLAMA.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32))
    with pytest.warns(UserWarning, match="the checkpoint has state of plugin 'scaled', and the run has not"):
        runtime.load(target, runtime.optimizer(torch.optim.AdamW, lr=1e-2))


def test_state_of_a_plugin_that_is_gone_is_named_in_a_warning(ranks, tmp_path):
    ranks(2).run(on_rank_train_with_state, checkpoint("llama"), tmp_path / "run", HERE, 0)
    ranks(2).run(on_rank_load_without_the_plugin, checkpoint("llama"), tmp_path / "run")


# ---- 6. features ----


@pytest.mark.parametrize("sizes", [{"pp_size": 2}, {"ep_size": 2}])
def test_options_of_an_outside_plugin_are_not_read_by_others(sizes):
    """Its config has a field ``enable_compile``, which is True, and means nothing to anybody else."""
    assert DistributedSetup.build(**options("tuned", **sizes), world_size=4)


@pytest.mark.parametrize("sizes", [{"pp_size": 2}, {"ep_size": 2}])
def test_features_of_an_outside_plugin_are_judged_under_its_own_words(sizes):
    from nemo_dist_outside import Tuned

    with pytest.raises(TopologyError, match="fuses=True is not proven with"):
        DistributedSetup.build(**options(Tuned(Tuned.config_type(fuses=True)), **sizes), world_size=4)


# ---- 7. no strategy has a privilege ----


def test_the_default_strategy_is_whoever_fills_the_role():
    roles = [entry for entry in Registry().roles if entry.name != "strategy"]
    own = [type(entry)("strategy", "wrapped", entry.group) for entry in Registry().roles if entry.name == "strategy"]
    setup = DistributedSetup.build(registry=Registry(roles=(*roles, *own)), world_size=4)

    assert setup.strategy.name == "wrapped"
    assert DistributedSetup.build(world_size=4).strategy.name == "fsdp2"


def test_a_package_gives_its_plugins_further_names():
    assert DistributedSetup.build(strategy="ddp-module", world_size=4).strategy.name == "wrapped"
    assert DistributedSetup.build(strategy="mfsdp", world_size=4, device_type="cuda").strategy.name == "megatron_fsdp"


def test_an_alias_neither_takes_the_place_of_a_plugin_nor_has_two_owners():
    (alias,) = [entry for entry in Registry().aliases if entry.name == "ddp_module"]
    thief = Registry(aliases=(type(alias)("fsdp2", "wrapped", alias.group),))
    assert thief.load("fsdp2").name == "fsdp2"

    torn = Registry(aliases=(alias, type(alias)("ddp_module", "ddp", alias.group)))
    with pytest.raises(PluginError, match=r"the alias 'ddp_module' stands for 'wrapped' of .* and 'ddp' of"):
        torn.load("ddp_module")


def test_the_package_is_in_the_catalogue_like_ours():
    names = set(Registry())

    assert {"counted", "wrapped", "split_labels"} <= names
    assert reference(Task()).losses  # and what they are compared with is one process


# ---- 8. shards that come back ----


def on_rank_reshard(folder, target):
    """Return, by what was called, how often the plugin was told to put its shards back."""
    from nemo_dist.plugin.resharding import keep_gathered
    from nemo_dist_outside import RESHARDED

    setup = DistributedSetup.build(**options("gathering", strategy=DDPConfig()))
    model = LLAMA.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    (batch,) = Task().batches(0)
    counts = {}

    def count(name, call):
        RESHARDED.clear()
        found = call()
        counts[name] = len(RESHARDED)
        return found

    def evaluate():
        with torch.no_grad():
            model(**batch)

    def twice():
        with keep_gathered([model]):
            evaluate()
            evaluate()

    count("evaluate", evaluate)
    count("evaluate twice, kept", twice)
    count("forward", lambda: model(**batch))
    runtime = count("runtime", lambda: setup.runtime(model, check_replicas=0))
    optimizer = count("optimizer", lambda: runtime.optimizer(torch.optim.SGD, lr=0.1))
    count("three batches", lambda: runtime.forward_backward([batch] * 3))
    count("clip", lambda: runtime.clip_grad_norm_(1.0))
    count("step", optimizer.step)
    count("save", lambda: runtime.save(target, optimizer))
    return counts


def test_a_plugin_is_told_when_to_put_its_shards_back(ranks, tmp_path):
    once = ("forward", "runtime", "clip", "step", "save")  # before a forward, and before parameters are looked at
    for counts in ranks(2).run(on_rank_reshard, checkpoint("llama"), tmp_path / "run"):
        assert {name: count for name, count in counts.items() if name in once} == dict.fromkeys(once, 1)
        assert counts["optimizer"] >= 1
        # Before and after a forward without gradients, and around forwards in a row, whatever their number.
        assert counts["evaluate"] == counts["evaluate twice, kept"] == counts["three batches"] == 2
