"""Faults that authors of plugins make, each planted in a plugin from elsewhere (tests/planted): who finds it, and how.

What a class declares, which hooks it has and what they return are judged by the core; wrong numbers are found by the
conformance kit, or by a save.
"""

import inspect
import json
import os
import re
from importlib.metadata import EntryPoint
from pathlib import Path

import attrs
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from nemo_dist import (
    ContextConfig,
    DDPConfig,
    DistributedSetup,
    FSDP2Config,
    ParallelismSizes,
    PluginError,
    Registry,
    TopologyError,
)
from nemo_dist.cli.main import app
from nemo_dist.mesh.dtensor import digest
from nemo_dist.plugin import contract
from nemo_dist.testing import PluginConformance
from nemo_dist.testing.equivalence import Task, checkpoint
from nemo_dist.testing.local_topology import LARGEST, fit
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.tensors import rows_of_rank
from nemo_dist.testing.tiny_models import SPECIMENS, first_modules

PLANTED = str(Path(__file__).parent / "planted")
FSDP2 = FSDP2Config(mp_policy=FP32)


@pytest.fixture(scope="module", autouse=True)
def installed():
    """Install the package as pip would: its modules and its entry points are found on the path, also by ranks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PLANTED)
        patch.setenv("PYTHONPATH", PLANTED, prepend=os.pathsep)
        yield


def refused(error, plugin, *, is_strategy=False, **more):
    """Return the message with which ``build`` refuses *plugin*."""
    chosen = {"strategy": plugin} if is_strategy else {"strategy": FSDP2, "plugins": (plugin,)}
    with pytest.raises(error) as caught:
        DistributedSetup.build(**chosen, world_size=4, **more)
    return str(caught.value)


# ---- what the core finds without a process group ----

DECLARED = {
    "raises on import": ("raising", "'raising' .* from nemo-dist-planted 1.0.* failed to import: OSError: libfoo.so.3"),
    "leaves on import": ("script", "'script' .* failed to import: SystemExit: 2; repair or uninstall it"),
    "class that is not there": ("absent", "'absent' .* AttributeError: .* no attribute 'Nope'"),
    "no class": ("number", "'number' .* must be a class"),
    "another name than its entry point": (
        "misnamed",
        "calls itself 'another'; the entry point and the class must agree",
    ),
    "upper case and hyphen": ("Bad-Name", r"has the name 'Bad-Name'; .*call it 'bad_name'"),
    "two owners of one name": ("twice", "'twice' is declared by both nemo-dist-planted 1.0 .* and nemo-dist-twin 2.0"),
    "stage after the strategy": ("late", "has stage = 75, and stages go from 0 to Stage.DATA, 70"),
    "stage that is text": ("first", "has stage = 'first'; a stage is a member of nemo_dist.Stage, or an int between"),
    "axes as text": ("worded", r"has axes = 'dp_shard', .* write frozenset\(\{'dp_shard'\}\)"),
    "contract to come": ("future", "was written for version 99 of the contract, and this nemo_dist has version 1"),
}
HOOKS = {
    "misspelled": r"implements warp\(\), which is no hook; did you mean 'wrap'\?",
    "unmarked": r"has a method wrap\(\) that is named like a hook and is not marked as one, .*put @hookimpl",
    "defaulted": r"wrap\(\) gives a default to 'mesh'.*remove the default",
    "misargued": r"has no argument 'meshes'; did you mean 'mesh'\? \(arguments: parts, mesh, plan\)",
    "greedy": r"wrap\(\) takes \*\*everything, .* name those that it needs",
    "hasty": r"wrap\(\) sets tryfirst.*set stage instead",
    "bare": r"validate\(\) must return a list of sentences \(got 'a bare sentence' of type str\)",
}


@pytest.mark.parametrize(("plugin", "message"), DECLARED.values(), ids=DECLARED)
def test_what_a_plugin_declares_wrongly_is_refused_by_name(plugin, message):
    assert re.search(message, refused(PluginError, plugin))


@pytest.mark.parametrize(("plugin", "message"), HOOKS.items(), ids=HOOKS)
def test_a_hook_that_does_not_fit_is_refused_by_name(plugin, message):
    found = refused(PluginError, plugin, is_strategy=plugin == "unmarked")
    assert f"plugin {plugin!r}" in found and re.search(message, found)


def test_broken_plugins_that_nobody_selects_change_nothing():
    """The planted package is installed with all its faults, and a second one that takes a name and a role of others."""
    names = ("raising", "script", "absent", "Bad-Name", "twice", "first")
    assert set(names) <= set(Registry())

    for build in ({}, {"strategy": "sound"}, {"activation_checkpointing": False}, {"strategy": "ddp"}):
        assert DistributedSetup.build(**build, world_size=4).plan.world_size == 4
    wide = DistributedSetup.build(parallelism_sizes=ParallelismSizes(cp_size=2), world_size=4)
    assert [plugin.name for plugin in wide.plugins] == ["context", "fsdp2"]
    assert wide.to_dict() == {"strategy": "fsdp2", "cp_size": 2}
    assert "unknown strategy 'sond'; did you mean 'sound'" in refused(PluginError, "sond", is_strategy=True)


def test_the_list_of_plugins_shows_every_broken_one_with_the_reason():
    shown = CliRunner().invoke(app, ["plugins", "--json"])
    assert shown.exit_code == 0, shown.output
    rows = json.loads(shown.stdout)  # what a module prints on import does not get in between
    errors = {row["name"]: row["error"] for row in rows}

    assert errors["sound"] is None and errors["fsdp2"] is None
    for plugin, message in DECLARED.values():
        assert re.search(message, errors[plugin])
    assert [row["version"] for row in rows if row["name"] == "twice"] == ["1.0", "2.0"]
    table = CliRunner().invoke(app, ["plugins"])
    assert table.exit_code == 0 and "BROKEN" in table.stdout


def test_a_broken_instance_is_refused_like_a_broken_class():
    from nemo_dist_planted import Late, Worded

    assert "has stage = 75" in refused(PluginError, Late())
    assert "has axes = 'dp_shard'" in refused(PluginError, Worded())


# ---- who composes with whom ----


def test_two_plugins_that_claim_one_axis_are_refused():
    sizes = {"parallelism_sizes": ParallelismSizes(cp_size=2)}
    alone = DistributedSetup.build(FSDP2, plugins=("ring",), world_size=4, **sizes)
    assert [plugin.name for plugin in alone.plugins] == ["ring", "fsdp2"]

    with pytest.raises(TopologyError, match="axis 'cp' has size 2 and is claimed by 'ring' and 'context'") as caught:
        DistributedSetup.build(FSDP2, plugins=("ring", ContextConfig()), world_size=4, **sizes)
    assert "leave out 'ring' or 'context'" in str(caught.value)
    assert DistributedSetup.build(FSDP2, plugins=("ring", ContextConfig()), world_size=4), "no rank is split along cp"


def test_a_strategy_that_nobody_tested_with_a_plugin_without_an_axis_is_refused():
    from nemo_dist_planted import Batchless

    with pytest.raises(TopologyError) as caught:
        DistributedSetup.build("sound", plugins=(Batchless(),), world_size=4)
    assert (
        "plugin 'batchless' changes what is trained, but neither it nor strategy 'sound' says that they compose; use "
        "'ddp' or 'fsdp2'" in str(caught.value)
    )
    assert DistributedSetup.build(DDPConfig(), plugins=(Batchless(),), world_size=4)


@pytest.mark.parametrize(("most", "dp"), [(2, 1), (4, 2)])
def test_an_axis_of_a_plugin_from_elsewhere_is_verified_on_the_ranks_that_it_takes(most, dp):
    keywords = {"plugins": ("overlapping",), "parallelism_sizes": ParallelismSizes(extra={"parts": 2})}
    plan = fit(keywords, most, LARGEST).setup.plan
    assert (plan.size("parts"), plan.size("dp"), plan.world_size) == (2, dp, 2 * dp)


# ---- the switch ----


def test_a_plugin_is_turned_off_for_a_process(monkeypatch):
    monkeypatch.setenv("NEMO_DIST_WITHOUT", "Context, sound")
    off = "is turned off in this process by NEMO_DIST_WITHOUT='context,sound'"

    assert off in refused(PluginError, "sound", is_strategy=True)
    assert off in refused(PluginError, ContextConfig(), parallelism_sizes=ParallelismSizes(cp_size=2))
    with pytest.raises(PluginError, match=off):
        DistributedSetup.build(parallelism_sizes=ParallelismSizes(cp_size=2), world_size=4)
    assert DistributedSetup.build(world_size=4).strategy.name == "fsdp2"
    rows = {row["name"]: row for row in json.loads(CliRunner().invoke(app, ["plugins", "--json"]).stdout)}
    assert off in rows["sound"]["error"] and rows["ddp"]["error"] is None


def test_a_plugin_that_is_turned_off_frees_its_role(monkeypatch):
    mine = EntryPoint("cp", "ring", "nemo_dist.roles")
    both = (*Registry().roles, mine)
    with pytest.raises(PluginError, match="the role 'cp' is declared by"):
        Registry(roles=both).role("cp")
    assert Registry(roles=both, off=frozenset({"context"})).role("cp") == "ring"


# ---- versions of the contract ----


def test_a_hook_that_came_later_is_no_fault_of_an_older_plugin(monkeypatch):
    from nemo_dist_planted import Unmarked

    monkeypatch.setattr(contract, "ADDED", {"wrap": 2})
    assert DistributedSetup.build(strategy=Unmarked(), world_size=4)

    monkeypatch.setattr(contract, "CONTRACT", 2)
    monkeypatch.setattr("nemo_dist.plugin.declaration.CONTRACT", 2)
    monkeypatch.setattr(Unmarked, "contract", 2)
    assert "is not marked as one" in refused(PluginError, Unmarked(), is_strategy=True)


def test_a_hook_or_argument_that_is_gone_is_refused_by_name_with_what_to_do(monkeypatch):
    gone = {"warp": "implement wrap() instead", "wrap.meshes": "mesh has all of them"}
    monkeypatch.setattr(contract, "REMOVED", gone)

    assert "warp(), which is no hook any more: implement wrap() instead" in refused(PluginError, "misspelled")
    assert "has no argument 'meshes' any more: mesh has all of them" in refused(PluginError, "misargued")


# ---- what the kit finds without ranks ----


def kit(name, **attributes):
    return type("Kit", (PluginConformance,), {"plugin": name, **attributes})()


PLANNING = {
    "moody": ("test_it_judges_any_plan_without_raising", r"validate\(\) returned .*not today"),
    "by_rank": ("test_it_judges_any_plan_without_raising", r"validate\(\) returned \[\[\]\], and then \[\['not here"),
    "views_by_rank": ("test_it_judges_any_plan_without_raising", r"views\(\) returned .*, and then"),
    "freezing_to_explain": (
        "test_it_leaves_a_model_that_it_explains_as_it_is",
        "model.embed_tokens.weight is another one",
    ),
    "silent": ("test_it_says_what_it_does", r"KeyError: 'dp_shards'[^$]*raised by the explain hook of plugin 'silent'"),
}


@pytest.mark.parametrize(("plugin", "law", "message"), [(name, *rest) for name, rest in PLANNING.items()], ids=PLANNING)
def test_the_kit_finds_what_is_wrong_in_planning(plugin, law, message):
    with pytest.raises(AssertionError) as caught:
        getattr(kit(plugin), law)()
    said = str(caught.value)
    assert f"plugin {plugin!r} breaks a law: " in said and "look at: " in said and re.search(message, said), said


# ---- what the kit finds on ranks ----

PARITY, RESUMES = "test_it_computes_what_one_process_computes", "test_it_resumes_twice_as_if_it_had_never_stopped"
ACCUMULATES, COMPOSES = "test_it_accumulates_what_one_process_computes", "test_it_composes_with_what_it_says"
CROSSES = "test_its_checkpoints_go_to_and_from_another_strategy"
AGAIN, UNTOUCHED = "test_a_second_runtime_computes_the_same_again", "test_it_leaves_what_is_the_users_alone"
STEPS, EVALUATES = "test_it_steps_each_group_by_its_options", "test_it_evaluates_as_one_process_does"
TWO_SETUPS, FROZEN = "test_two_setups_train_side_by_side", "test_it_trains_beside_frozen_parameters"
# The plugin, the test of the kit, and what its message says besides plugin and law.
NUMBERS = [
    ("summed", PARITY, "every gradient is 2 times that of one process"),
    ("alone", PARITY, "replicas that must be equal on all ranks differ"),
    ("partial", PARITY, r"the gradient of model.layers.1.mlp.up_proj.weight: ranks \[1\] differ"),
    ("shards_only", COMPOSES, "replicas that must be equal on all ranks differ"),
    ("everybody", COMPOSES, "'tp_size': 2|tp_size=2"),
    ("forgetful_export", PARITY, "model.norm.weight"),
    ("permuting", CROSSES, "its own checkpoint"),
    ("permuting_import", RESUMES, "step 2 after the first resume: loss and norm"),
    ("leaking", "test_it_leaves_nothing_behind", "process groups after the first runtime"),
    ("drifting_load", PARITY, "model.norm.weight: ranks"),
    ("failing", PARITY, "boom on one rank[^$]*raised by after_backward of plugin 'failing'"),
    ("counting_twice", ACCUMULATES, "gradients"),
    ("dropping_rows", PARITY, "the first loss is wrong, before any gradient"),
    ("overlapping", PARITY, "the first loss is wrong, before any gradient"),
    ("stale", PARITY, "the loss is right until step"),
    ("hiding_moments", RESUMES, "after the second resume"),
    ("drifting_norm", PARITY, "model.norm.weight: ranks"),
    ("untying", "test_it_trains_a_tied_weight_as_one", "lm_head.weight"),
    ("mapping", PARITY, r"runtime\(\) must return a nemo_dist.RuntimePart \(got \{'no_sync': None\} of type dict\)"),
    ("returning", PARITY, r"shard\(\) must return nothing, as it edits what it is given in place"),
    ("batchless", PARITY, r"batch\(\) must return the batch, a mapping \(got None\)"),
    ("local_unsaid", PARITY, "replicas that must be equal on all ranks differ"),
    ("local_lost", RESUMES, "declares replicas_differ and keeps nothing of each rank"),
    ("sharded_moments", RESUMES, "optimizer is that of plugin 'sharded_moments'[^$]*lists only the parameters"),
    ("one_axis", COMPOSES, "replicas that must be equal on all ranks differ|cp_size=2"),
    ("seeing_shards", COMPOSES, "'tp_size': 2|tp_size=2"),
    ("casting", PARITY, "norm.weight"),
    ("swapping", PARITY, "the first loss is wrong"),
    ("thawing", FROZEN, "unexpected .*'model.embed_tokens.weight'"),
    ("scaling", PARITY, "every gradient is 2 times that of one process"),
    ("norm_twice", PARITY, r"norms\[0\]"),
    ("exporting_in_place", PARITY, "gradients"),
    ("averaging_late", "test_it_sums_gradients_in_the_loop_of_the_user", "differs between ranks"),
    ("stepping_what_waits", "test_it_steps_no_gradients_that_wait", "parameters after a step: "),
    ("last_model", TWO_SETUPS, "state in modules or on classes"),
    (
        "hooking_again",
        AGAIN,
        "the gradient of model.embed_tokens.weight is another one[^$]*runtime\\(\\), which is called",
    ),
    ("learning_in_evaluation", AGAIN, "the loss is .*, and was"),
    ("editing_batch", UNTOUCHED, "labels of the batch that it was given"),
    ("reseeding", UNTOUCHED, "torch's random generator"),
    ("switching_mode", UNTOUCHED, "training of module"),
    ("wordy", AGAIN, r"metrics\(\) must return a mapping from names to numbers"),
    ("lingering", "test_it_leaves_nothing_behind", "threads after the first runtime"),
    ("regrouping", STEPS, "norm.weight is off"),
    ("deaf", STEPS, "is off"),
    ("own_adamw", STEPS, "parameters under SGD: .* is off"),
    ("losing_momentum", STEPS, "parameters under SGD: .* is off"),
    ("losing_betas", STEPS, "parameters under AdamW: .* is off"),
    ("blind_in_evaluation", EVALUATES, "new weights: the evaluated loss is .*[^$]*logits are off"),
    ("leaving_training", UNTOUCHED, "training of module 'model', in a step in training mode"),
    ("entering_training", UNTOUCHED, "training of module 'model', in loading"),
    ("seeding_loads", UNTOUCHED, "torch's random generator, in loading"),
    ("caching_by_name", TWO_SETUPS, "setup 0, step 1"),
    ("second_axis", COMPOSES, "'shares': 2"),
    ("summing_adapters", COMPOSES, "every gradient is 2 times that of one process"),
    ("reconfiguring", CROSSES, "the exported configuration has max_position_embeddings"),
    ("adding_a_buffer", CROSSES, "model.steps"),
    ("consolidating", RESUMES, "made has taken steps and shows no state on any rank"),
]


@pytest.mark.parametrize(("plugin", "law", "message"), NUMBERS, ids=[name for name, *_ in NUMBERS])
def test_the_kit_finds_what_is_wrong_on_ranks(ranks, plugin, law, message):
    with pytest.raises(AssertionError) as caught:
        getattr(kit(plugin), law)(ranks)
    said = str(caught.value)
    assert f"plugin {plugin!r} breaks a law: " in said and "look at: " in said and re.search(message, said), said


def test_a_strategy_that_this_machine_cannot_run_is_left_out_and_named(ranks):
    beside = kit("beside_elsewhere")
    strategies = {case.strategy: case for case in beside.cases()}
    beside.cases = lambda: [strategies["elsewhere"]]
    with pytest.raises(pytest.skip.Exception, match=r"'elsewhere' \(this machine cannot run it\); what else it comp"):
        getattr(beside, COMPOSES)(ranks)


# ---- no law passes that was not tried ----


@pytest.mark.parametrize("specimen", SPECIMENS)
def test_every_specimen_has_a_block_and_an_embedding_to_freeze(specimen):
    block, embedding = first_modules(specimen)
    names = [name for name, _ in SPECIMENS[specimen].make().named_parameters()]
    for prefix in (block, embedding):
        assert any(name.startswith(prefix) for name in names)
    assert not embedding.startswith(block)
    assert not all(name.startswith((block, embedding)) for name in names)


def test_the_kit_finds_a_thawed_parameter_of_any_family(ranks):
    with pytest.raises(AssertionError, match=r"unexpected .*'transformer.wte.weight'"):
        getattr(kit("thawing", specimen="gpt2"), FROZEN)(ranks)


UNTRIED = {
    "a head of its own": (kit("sound", specimen="qwen3"), "test_it_trains_a_tied_weight_as_one", "head of its own"),
    "no strategy": (kit("second_axis"), "test_a_strategy_refuses_the_axes_it_does_not_compose_with", "is no strategy"),
    "every axis": (kit("fsdp2"), "test_a_strategy_refuses_the_axes_it_does_not_compose_with", "with every axis"),
    "replicas": (kit("local", bound=0.2), "test_it_sums_gradients_in_the_loop_of_the_user", "replicas differ"),
}


@pytest.mark.parametrize(("tested", "law", "reason"), UNTRIED.values(), ids=UNTRIED)
def test_a_law_that_does_not_apply_is_skipped_with_the_reason(tested, law, reason):
    call = getattr(tested, law)
    with pytest.raises(pytest.skip.Exception, match=reason):
        call(*[None] * len(inspect.signature(call).parameters))


def test_an_engine_has_no_loop_of_the_user(ranks):
    sizes = {"strategy": FSDP2, "parallelism_sizes": ParallelismSizes(pp_size=2)}
    with pytest.raises(pytest.skip.Exception, match="runs the batches by an engine"):
        kit("pipeline", build=sizes).test_it_sums_gradients_in_the_loop_of_the_user(ranks)


def test_an_optimizer_that_is_refused_is_named(ranks):
    with pytest.raises(pytest.skip.Exception, match=r"it refuses SGD: .*SGD is not proven here; use AdamW"):
        getattr(kit("refusing_sgd"), STEPS)(ranks)


def test_selective_recomputation_that_a_strategy_names_is_compared(ranks):
    tested = kit("selective_unseen")
    (selective,) = [case for case in tested.cases() if case.name == "activation_checkpointing:selective"]
    assert selective.build["activation_checkpointing"] == "selective"
    from nemo_dist_recompute import RecomputeConfig

    # The package's twin claims the role of recomputation, too, so that it has to be selected by name here.
    build = {"strategy": "selective_unseen", "plugins": (RecomputeConfig(mode="selective"),)}
    tested.cases = lambda: [attrs.evolve(selective, build=build)]
    with pytest.raises(AssertionError, match="every gradient is 2 times that of one process"):
        getattr(tested, COMPOSES)(ranks)


CASES = {  # the plugin: the names of the cases beside twice the ranks, and the words that cannot be tried
    "second_axis": ({"strategy ddp", "shares=2"}, set()),
    "selective_unseen": ({"activation_checkpointing:selective"}, set()),
    "summing_adapters": ({"adapters"}, set()),
    "promising": (set(), {"compile", "tp_fast"}),
    "fsdp2": ({"adapters", "activation_checkpointing:selective", "tp_size=2", "pp_size=2"}, set()),
    "pipeline": ({"adapters", "tp_size=2"}, set()),
    "moe": ({"tp_size=2", "cp_size=2"}, {"ep_within_replica"}),
}


@pytest.mark.parametrize(("specimen", "why"), [("gpt2", "no linear layer"), ("mamba", "incompatible with Mamba")])
def test_a_model_that_takes_no_adapters_is_named(specimen, why):
    (untried,) = kit("summing_adapters", specimen=specimen).untried()
    assert untried.word == "adapters" and why in untried.why


@pytest.mark.parametrize(("plugin", "names", "words"), [(name, *rest) for name, rest in CASES.items()], ids=CASES)
def test_each_axis_and_feature_of_a_plugin_is_tried_or_named(plugin, names, words):
    tested = kit(plugin)
    assert names <= {case.name for case in tested.cases()}
    assert {one.word for one in tested.untried()} == words and all(one.why for one in tested.untried())


def laws_on_ranks():
    return [name for name in dir(PluginConformance) if name.startswith("test_")]


@pytest.mark.parametrize("law", laws_on_ranks())
@pytest.mark.parametrize("plugin", ["sound", "owned_moments"])
def test_a_plugin_without_a_fault_keeps_every_law(ranks, plugin, law):
    call = getattr(kit(plugin), law)
    call(*[ranks] * (len(inspect.signature(call).parameters)))


# ---- plugins that are inexact by design ----


def test_an_inexact_plugin_is_held_to_its_bound(ranks):
    getattr(kit("halving", bound=1e-2), PARITY)(ranks)

    with pytest.raises(AssertionError, match="within the bound that it states"):
        getattr(kit("halving"), PARITY)(ranks)
    with pytest.raises(AssertionError, match="computes what one process computes"):
        getattr(kit("halving", bound=1e-4), PARITY)(ranks)
    assert (
        "halving: does not compute what one process computes, by design"
        in DistributedSetup.build("halving", world_size=2).explain()
    )


def test_replicas_that_differ_by_design_resume_exactly_and_are_saved_as_one(ranks):
    differing = kit("local", bound=0.2)
    getattr(differing, PARITY)(ranks)
    getattr(differing, RESUMES)(ranks)


def on_rank_save_a_replica(folder, target):
    setup = DistributedSetup.build(strategy="local")
    runtime = setup.runtime(Task().load(folder, distributed_setup=setup))
    optimizer = runtime.optimizer(torch.optim.AdamW, lr=1e-2)
    runtime.forward_backward(rows_of_rank(Task().batches(0)[0], runtime))
    optimizer.step()
    runtime.save(target, optimizer)
    return sorted(tuple(parameter.shape) for _, parameter in runtime.named_parameters())


def test_tensors_that_a_plugin_keeps_of_a_rank_are_saved_as_tensors(ranks, tmp_path):
    shapes, _ = ranks(2).run(on_rank_save_a_replica, checkpoint("llama"), tmp_path / "run")
    saved = load_file(tmp_path / "run" / "rank-00001.safetensors")
    kept = [tensor for name, tensor in saved.items() if name.startswith("rank/")]
    assert len(saved["rank"]) < sum(tensor.nbytes for tensor in kept) / 4  # it has names of them, and no values
    assert sorted(tuple(tensor.shape) for tensor in kept) == sorted(
        3 * shapes + [()] * len(shapes)
    )  # weight, two moments, and the number of steps


# ---- what a save compares ----


def on_rank_save_unequal(folder, target, what):
    setup = DistributedSetup.build(strategy=DDPConfig())
    model = SPECIMENS["llama"].load.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    runtime = setup.runtime(model, check_replicas=0)
    optimizer = runtime.optimizer(torch.optim.AdamW, lr=1e-2)
    runtime.forward_backward(rows_of_rank(Task().batches(0)[0], runtime))
    optimizer.step()
    weight = model.model.norm.weight
    with torch.no_grad():
        (weight if what == "weight" else optimizer.state[weight]["exp_avg"])[0] += 1e-6 * torch.distributed.get_rank()
    runtime.save(target, optimizer)


@pytest.mark.parametrize(
    ("what", "name"), [("weight", "model/model.norm.weight"), ("moment", "optimizer.exp_avg/model.norm.weight")]
)
def test_a_save_refuses_copies_that_differ_and_names_them(ranks, tmp_path, what, name):
    with pytest.raises(Exception, match=re.escape(f"- {name}: rank 1 differs from rank 0")) as caught:
        ranks(2).run(on_rank_save_unequal, checkpoint("llama"), tmp_path / "run", what)
    assert "a checkpoint would be a mix of them" in str(caught.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8, torch.complex64])
@pytest.mark.parametrize("size", [1, 3, 8, 13])
def test_a_digest_tells_values_apart_wherever_they_lie_in_memory(dtype, size):
    values = torch.arange(1, size + 2).to(dtype)[1:]  # does not begin at a whole word
    assert digest(values) == digest(values.clone())
    for place in (0, size - 1):
        other = values.clone()
        other[place] += 1
        assert digest(other) != digest(values)
