"""What must be refused is refused at ``build``, without a process group, in a message that says what to do."""

import attrs
import pytest

from nemo_dist import (
    DDPConfig,
    DistributedSetup,
    FSDP2Config,
    MeshContext,
    MoEParallelizerConfig,
    ParallelismSizes,
    PipelineConfig,
    PluginError,
    Registry,
    Stage,
    TopologyError,
    UnknownNameError,
    hookimpl,
)

SIZES = ("tp_size", "pp_size", "cp_size", "ep_size", "dp_size", "dp_replicate_size")


def refused(error=ValueError, **options):
    """Return the message of the error that ``build`` raises."""
    with pytest.raises(error) as caught:
        DistributedSetup.build(**{"world_size": 8, **options})
    return str(caught.value)


@pytest.mark.parametrize("given", [{}, {"pp_schedule": "1f1b"}])
def test_a_pipeline_config_without_pipeline_stages_is_refused(given):
    message = refused(pipeline_config=given)
    assert "pipeline_config was given" in message and "pp_size" in message


@pytest.mark.parametrize("given", [{}, {"ignore_router_for_ac": True}])
def test_a_moe_config_without_expert_parallelism_is_refused(given):
    message = refused(moe_parallel_config=given)
    assert "moe_parallel_config was given" in message and "ep_size" in message


@pytest.mark.parametrize(("name", "meant"), [("fdsp2", "fsdp2"), ("DPP", "ddp"), ("fsdp-3", "fsdp2")])
def test_an_unknown_strategy_suggests_the_near_one(name, meant):
    message = refused(UnknownNameError, strategy=name)
    assert f"did you mean {meant!r}" in message and "valid names: " in message and "ddp, fsdp2" in message
    assert issubclass(UnknownNameError, ValueError)


@pytest.mark.parametrize("name", ["fsdp2", "FSDP2", " ddp", "Ddp"])
def test_a_strategy_name_is_normalised(name):
    assert DistributedSetup.build(strategy=name, world_size=2).strategy.name == name.strip().lower()


def test_a_class_instead_of_an_instance_is_refused():
    assert "write FSDP2Config()" in refused(TypeError, strategy=FSDP2Config)


@pytest.mark.parametrize("strategy", [None, 3, {"name": "fsdp2"}])
def test_a_strategy_of_the_wrong_type_is_refused(strategy):
    message = refused(TypeError, strategy=strategy)
    assert (
        "strategy must be a plugin name, a config object or a plugin instance" in message and repr(strategy) in message
    )


def test_an_unknown_option_suggests_the_near_one():
    with pytest.raises(TypeError, match=r"no option 'mp_polcy'; did you mean 'mp_policy'\?.*valid names: mp_policy"):
        FSDP2Config(mp_polcy=None)


def test_an_unknown_field_of_a_policy_suggests_the_near_one():
    with pytest.raises(ValueError, match=r"no field 'param_type'; did you mean 'param_dtype'"):
        FSDP2Config(mp_policy={"param_type": "bfloat16"})
    with pytest.raises(ValueError, match=r"'bfloat61'\); did you mean 'bfloat16'"):
        FSDP2Config(mp_policy={"param_dtype": "bfloat61"})


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (FSDP2Config, {"defer_fsdp_grad_sync": 1}),
        (FSDP2Config, {"forward_prefetch_depth": 0}),
        (FSDP2Config, {"forward_prefetch_depth": True}),
        (FSDP2Config, {"reshard_after_forward": "yes"}),
        (FSDP2Config, {"mp_policy": "bf16"}),
        (FSDP2Config, {"offload_policy": True}),
        (DDPConfig, {"bucket_cap_mb": 0}),
        (DDPConfig, {"bucket_cap_mb": 1.5}),
        (DDPConfig, {"static_graph": None}),
    ],
)
def test_an_option_of_the_wrong_type_or_range_is_refused_by_name(config, options):
    ((name, value),) = options.items()
    with pytest.raises((TypeError, ValueError)) as error:
        config(**options)
    assert name in str(error.value) and repr(value) in str(error.value)


@pytest.mark.parametrize("field", SIZES)
@pytest.mark.parametrize("value", [0, -2])
def test_a_size_below_one_names_its_field(field, value):
    with pytest.raises(ValueError) as error:
        ParallelismSizes(**{field: value})
    assert field in str(error.value) and str(value) in str(error.value)


@pytest.mark.parametrize("field", SIZES)
@pytest.mark.parametrize("value", [2.0, "2", True, [2]])
def test_a_size_of_the_wrong_type_names_its_field(field, value):
    with pytest.raises(TypeError) as error:
        ParallelismSizes(**{field: value})
    assert field in str(error.value) and repr(value) in str(error.value)


def test_sizes_of_the_wrong_type_are_refused():
    assert "ParallelismSizes(tp_size=2)" in refused(TypeError, parallelism_sizes={"tp_size": 2})


def test_a_world_that_the_sizes_do_not_divide_shows_the_arithmetic():
    message = refused(parallelism_sizes=ParallelismSizes(tp_size=3), world_size=8)
    assert "world_size 8 is not divisible by" in message and "= 3" in message


def test_a_data_parallel_size_that_leaves_ranks_without_a_place_is_refused():
    message = refused(parallelism_sizes=ParallelismSizes(dp_size=3))
    assert "dp_size" in message and "= 3, but world_size is 8" in message


@pytest.mark.parametrize(
    ("replicate", "words"), [(3, "does not divide"), (8, "equals the data-parallel size"), (16, "does not divide")]
)
def test_replicas_that_do_not_fit_the_data_parallel_size_are_refused(replicate, words):
    message = refused(parallelism_sizes=ParallelismSizes(dp_replicate_size=replicate))
    assert f"dp_replicate_size {replicate} {words}" in message


def test_replicas_with_another_strategy_say_who_has_them():
    message = refused(strategy="ddp", parallelism_sizes=ParallelismSizes(dp_replicate_size=2))
    assert "axis 'dp_replicate' has size 2" in message and "fsdp2" in message


@pytest.mark.parametrize("axis", ["tp", "pp", "cp", "ep"])
def test_ddp_refuses_every_model_axis(axis):
    message = refused(strategy="ddp", parallelism_sizes=ParallelismSizes(**{f"{axis}_size": 2}))
    assert f"axis {axis!r} has size 2" in message and "ddp" in message


def test_resharding_to_a_number_that_does_not_divide_the_shards_is_refused():
    assert "reshard_after_forward=3 must divide the 8 ranks" in refused(strategy=FSDP2Config(reshard_after_forward=3))


@pytest.mark.parametrize("value", ["bogus", "Full", 2, 0.5, ()])
def test_an_unknown_mode_of_activation_checkpointing_is_refused(value):
    message = refused(activation_checkpointing=value)
    assert "must be False, True, 'full' or 'selective'" in message and repr(value) in message


def test_activation_checkpointing_that_contradicts_itself_is_refused():
    message = refused(strategy=FSDP2Config(activation_checkpointing="selective"), activation_checkpointing=True)
    assert "'full' on the setup but 'selective' on FSDP2Config" in message


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ([0, 1, 1, 2], "[1] more than once"),
        ([0, 9], "[9], but the world has ranks 0 to 7"),
        ([-1, 0], "[-1]"),
        ([], "empty"),
    ],
)
def test_repeated_unknown_or_no_ranks_are_refused(ranks, words):
    assert words in refused(ranks=ranks)


def test_ranks_that_do_not_fill_the_mesh_are_refused():
    message = refused(ranks=[0, 1, 2], parallelism_sizes=ParallelismSizes(dp_size=2))
    assert "= 2, but world_size is 3" in message


def test_ranks_of_the_wrong_type_are_refused():
    assert "ranks must be ints (got '1')" in refused(TypeError, ranks=["1"])


@pytest.mark.parametrize(("option", "value"), [("timeout_minutes", "5"), ("device_type", 3), ("plugins", "recompute")])
def test_a_keyword_of_the_wrong_type_is_refused(option, value):
    assert option in refused(TypeError, **{option: value})


def test_a_timeout_that_is_not_positive_is_refused():
    assert "timeout_minutes must be positive (got 0)" in refused(timeout_minutes=0)


@pytest.mark.parametrize("value", [0, -1, 2.0, "8", True])
def test_a_world_size_that_is_no_number_of_ranks_is_refused(value):
    assert "world_size" in refused((TypeError, ValueError), world_size=value)


def test_all_problems_are_raised_together():
    with pytest.raises(TopologyError) as error:
        DistributedSetup.build(
            strategy=FSDP2Config(reshard_after_forward=3),
            parallelism_sizes=ParallelismSizes(dp_size=3, dp_replicate_size=2),
            pipeline_config={},
            activation_checkpointing="bogus",
            world_size=8,
        )
    for words in ("world_size is 8", "does not divide", "pipeline_config", "'bogus'", "reshard_after_forward"):
        assert sum(words in problem for problem in error.value.problems) == 1, (words, error.value.problems)


def test_a_mesh_that_is_no_device_mesh_is_refused():
    with pytest.raises(TypeError, match="must be a torch DeviceMesh"):
        MeshContext.from_meshes("mesh")


def test_without_a_mesh_the_sizes_are_one():
    context = MeshContext()
    assert (context.pp_size, context.tp_size, context.cp_size, context.ep_size, context.dp_size) == (1, 1, 1, 1, 1)
    assert context.device_mesh is None and context.moe_mesh is None


# ---- plugins that break the contract ----


@attrs.frozen
class Config:
    plugin = "stranger"


def plugin(stage=Stage.RECOMPUTE, **members):
    """Return an instance of a plugin that was never installed, with *members* beside what every plugin has."""
    base = {
        "name": "stranger",
        "config_type": Config,
        "stage": stage,
        "axes": frozenset(),
        "composes_with": frozenset(),
    }
    kind = type("Stranger", (), {**base, "config": Config(), **members})
    return kind()


def test_a_misspelled_hook_names_plugin_and_hook():
    @hookimpl
    def validat(self, plan):
        return []

    message = refused(PluginError, plugins=(plugin(validat=validat),))
    assert "'stranger'" in message and "validat()" in message and "did you mean 'validate'" in message


def test_a_hook_argument_that_does_not_exist_is_refused():
    @hookimpl
    def validate(self, plan, model):
        return []

    message = refused(PluginError, plugins=(plugin(validate=validate),))
    assert "'stranger'" in message and "model" in message


def test_a_hook_argument_with_a_default_is_refused():
    @hookimpl
    def validate(self, plan=None):
        return []

    message = refused(PluginError, plugins=(plugin(validate=validate),))
    assert "'stranger'" in message and "'plan'" in message and "remove the default" in message


@pytest.mark.parametrize("order", ["tryfirst", "trylast", "wrapper"])
def test_an_order_other_than_the_stage_is_refused(order):
    def validate(self, plan):
        yield

    message = refused(PluginError, plugins=(plugin(validate=hookimpl(**{order: True})(validate)),))
    assert "'stranger'" in message and "stage" in message


def test_an_exception_in_a_hook_names_plugin_and_hook():
    @hookimpl
    def validate(self, plan):
        raise ZeroDivisionError("oops")

    with pytest.raises(ZeroDivisionError) as error:
        DistributedSetup.build(plugins=(plugin(validate=validate),), world_size=2)
    assert error.value.__notes__ == ["raised by the validate hook of plugin 'stranger'"]


def test_two_strategies_are_refused():
    message = refused(plugins=("ddp",))
    assert "'ddp' is a strategy; a setup has exactly one" in message


def test_a_plugin_that_is_no_strategy_as_strategy_is_refused():
    assert "is no strategy" in refused(strategy=plugin())


def test_the_same_plugin_twice_is_refused():
    assert "selected twice" in refused(plugins=(plugin(), plugin()))


@attrs.frozen
class Entry:
    """Stands for an entry point of a distribution that is not installed here."""

    name: str
    value: str
    loaded: object = None

    @attrs.define
    class Dist:
        name: str
        version: str = "1.0"

    dist: Dist = attrs.field(default=Dist("some-dist"))

    def load(self):
        if isinstance(self.loaded, Exception):
            raise self.loaded
        return self.loaded


def test_two_owners_of_one_name_are_refused():
    other = Entry("mine", "b:B", dist=Entry.Dist("other-dist", "2.0"))
    with pytest.raises(
        PluginError, match=r"'mine' is declared by both other-dist 2\.0 .* and some-dist 1\.0.*uninstall"
    ):
        Registry((Entry("mine", "a:A"), other)).load("mine")


def test_a_plugin_that_fails_to_import_names_its_distribution():
    registry = Registry((Entry("mine", "a:A", ImportError("no module named cupy")),))
    message = refused(PluginError, strategy="mine", registry=registry)
    assert "'mine'" in message and "some-dist 1.0" in message and "no module named cupy" in message


@pytest.mark.parametrize(
    ("loaded", "words"), [(3, "must be a class"), (type("P", (), {}), "lacks the class attribute")]
)
def test_an_entry_point_that_holds_no_plugin_is_refused(loaded, words):
    with pytest.raises(PluginError, match=words):
        Registry((Entry("mine", "a:A", loaded),)).load("mine")


def test_a_class_named_otherwise_than_its_entry_point_is_refused():
    stranger = type(plugin())
    with pytest.raises(PluginError, match="calls itself 'stranger'"):
        Registry((Entry("mine", "a:A", stranger),)).load("mine")


def test_a_broken_plugin_that_nobody_selects_changes_nothing():
    entries = (*Registry().entries, Entry("broken", "a:A", ImportError("boom")))
    setup = DistributedSetup.build(world_size=2, registry=Registry(entries))
    assert [each.name for each in setup.plugins] == ["fsdp2"]


def test_a_role_with_two_owners_is_refused_when_it_is_needed():
    registry = Registry(roles=(Entry("pp", "one"), Entry("pp", "two", dist=Entry.Dist("other-dist"))))
    message = refused(PluginError, strategy="fsdp2", parallelism_sizes=ParallelismSizes(pp_size=2), registry=registry)
    assert "'pp' is declared by 'one' of some-dist 1.0 and 'two' of other-dist 1.0" in message


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (MoEParallelizerConfig, {"lm_head_precision": 10**5000}),
        (FSDP2Config, {"mp_policy": {"param_dtype": 10**5000}}),
        (FSDP2Config, {"mp_policy": {10**5000: "float32"}}),
        (PipelineConfig, {"pp_schedule_csv": 10**5000}),
        (PipelineConfig, {"pp_microbatch_size": 10**5000}),
        (FSDP2Config, {"reshard_after_forward": 10**5000}),
    ],
)
def test_a_number_that_python_does_not_write_is_refused_in_words(config, options):
    with pytest.raises((TypeError, ValueError), match="<int>"):
        config(**options)
