"""The ``distributed:`` section: what it means, what it refuses, and that it says everything about a setup."""

import subprocess
import sys

import attrs
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from nemo_dist import ContextConfig, DDPConfig, DistributedSetup, FSDP2Config, ParallelismSizes, UnknownNameError
from nemo_dist.cli.main import app
from nemo_dist.planning.validation import shown
from nemo_dist.testing.strategies import topologies

DTYPES = st.sampled_from(["float32", "bfloat16", "float16"])
POLICIES = st.fixed_dictionaries(
    {},
    optional={
        "param_dtype": DTYPES,
        "reduce_dtype": DTYPES,
        "output_dtype": DTYPES,
        "cast_forward_inputs": st.booleans(),
    },
)
MODES = st.sampled_from([False, "full", "selective"])


@st.composite
def setups(draw):
    """Draw a setup that fsdp2 or ddp composes, with options of every kind."""
    mode = draw(MODES)
    recompute = {"activation_checkpointing": mode}
    scope = draw(st.sampled_from([None, "language", ("vision", "audio")])) if mode else None
    if draw(st.booleans()):
        sizes, world = draw(topologies(64, ("dp_shard",)))
        config = DDPConfig(bucket_cap_mb=draw(st.integers(1, 99)), activation_checkpointing_scope=scope)
        return DistributedSetup.build(strategy=config, parallelism_sizes=sizes, world_size=world, **recompute)
    sizes, world = draw(topologies(64, ("dp_replicate", "dp_shard", "cp")))
    config = FSDP2Config(
        mp_policy=draw(st.none() | POLICIES),
        offload_policy=draw(st.sampled_from([None, "cpu", {"pin_memory": False}])),
        reshard_after_forward=draw(st.sampled_from([None, True, False])),
        enable_compile=draw(st.booleans()),
        activation_checkpointing_scope=scope,
    )
    methods = st.sampled_from(["all_gather", "ulysses"])
    context = (
        [ContextConfig(method=draw(methods), balance=draw(st.none() | st.booleans()))] if draw(st.booleans()) else []
    )
    minutes = draw(st.none() | st.integers(1, 60))
    return DistributedSetup.build(
        strategy=config,
        parallelism_sizes=sizes,
        world_size=world,
        plugins=context,
        timeout_minutes=minutes,
        **recompute,
    )


@given(setup=setups())
def test_a_setup_survives_being_written_and_read(tmp_path_factory, setup):
    section = setup.to_dict()
    path = tmp_path_factory.mktemp("section") / "config.yaml"
    path.write_text(yaml.safe_dump({"model": {"name": "other"}, "distributed": section}))
    again = DistributedSetup.from_yaml(path, world_size=setup.plan.world_size)
    assert again.to_dict() == section
    assert again.plan == setup.plan
    assert [(plugin.name, _listed(plugin.config)) for plugin in again.plugins] == [
        (plugin.name, _listed(plugin.config)) for plugin in setup.plugins
    ]


def _listed(config):
    return {name: list(value) if isinstance(value, tuple) else value for name, value in attrs.asdict(config).items()}


def test_a_section_means_what_build_means():
    section = {
        "strategy": "fsdp2",
        "dp_replicate_size": 2,
        "dp_size": "none",
        "mp_policy": {"_target_": "torch.distributed.fsdp.MixedPrecisionPolicy", "param_dtype": "bf16"},
        "activation_checkpointing": True,
    }
    expected = DistributedSetup.build(
        strategy=FSDP2Config(mp_policy={"param_dtype": "bfloat16"}),
        parallelism_sizes=ParallelismSizes(dp_replicate_size=2),
        activation_checkpointing=True,
        world_size=8,
    )
    assert DistributedSetup.from_dict(section, world_size=8).describe() == expected.describe()


def test_the_options_of_other_axes_survive_too():
    section = {
        "strategy": "fsdp2",
        "tp_size": 2,
        "pp_size": 2,
        "sequence_parallel": True,
        "tp_plan": {"layers.*.mlp.gate_proj": "colwise"},
        "pipeline": {"pp_schedule": "GPipe"},
    }
    setup = DistributedSetup.from_dict(section, world_size=8)
    assert setup.to_dict() == section
    assert setup.pipeline_config.pp_schedule == "GPipe"
    assert next(plugin for plugin in setup.plugins if plugin.name == "tensor").config.sequence_parallel


def test_a_setup_of_defaults_is_its_strategy():
    assert DistributedSetup.build(world_size=4).to_dict() == {"strategy": "fsdp2"}
    assert DistributedSetup.from_dict({}, world_size=4).to_dict() == {"strategy": "fsdp2"}


def test_a_policy_of_torch_is_written_by_the_names_of_its_dtypes():
    import torch
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    config = FSDP2Config(
        mp_policy=MixedPrecisionPolicy(param_dtype=torch.float32), offload_policy=CPUOffloadPolicy(pin_memory=False)
    )
    section = DistributedSetup.build(strategy=config, world_size=2).to_dict()
    assert section["mp_policy"]["param_dtype"] == "float32"
    assert section["offload_policy"] == {"pin_memory": False}
    assert DistributedSetup.from_dict(section, world_size=2).to_dict() == section


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"tp_sise": 2}, "unknown key 'tp_sise' for strategy 'fsdp2'; did you mean 'tp_size'"),
        ({"strategy": "fsdp3"}, "unknown strategy 'fsdp3'; did you mean 'fsdp2'"),
        (
            {"strategy": "ddp", "mp_policy": None},
            "unknown key 'mp_policy' for strategy 'ddp'; it is an option of 'fsdp2'",
        ),
        ({"a": 1, "b": 2}, "unknown key 'a'.*unknown key 'b'"),
        ({"mp_policy": {"param_dtyp": "float32"}}, "mp_policy has no field 'param_dtyp'; did you mean 'param_dtype'"),
        ({"mp_policy": {"_target_": "os.system"}}, "mp_policy has no field '_target_'"),
        ({"offload_policy": {"pin": True}}, "offload_policy has no field 'pin'"),
        (
            {"plugins": {"context": {"metod": "ulysses"}}},
            "plugins.context has an unknown key 'metod'; did you mean 'method'",
        ),
        ({"plugins": ["contxt"]}, "no plugin 'contxt' is installed; did you mean 'context'"),
        ({"pipeline": {}}, "pipeline_config was given, but pp_size is 1"),
        ({"moe": {}}, "moe_parallel_config was given, but ep_size is 1"),
    ],
)
def test_a_section_with_wrong_keys_is_refused(section, message):
    with pytest.raises(ValueError, match=message):
        DistributedSetup.from_dict(section, world_size=4)


def test_wrong_types_are_refused():
    for section in ([], {"strategy": FSDP2Config()}, {"tp_size": "2"}):
        with pytest.raises(TypeError):
            DistributedSetup.from_dict(section, world_size=4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("distributed:\n  tp_size: 1\n  tp_size: 2\n", "tp_size stands twice in the mapping at line 2"),
        ("distributed:\n  mp_policy: {param_dtype: float32, param_dtype: float16}\n", "param_dtype stands twice"),
        ("distributed: {}\ndistributed: {}\n", "distributed stands twice"),
        ("strategy: fsdp2\n", r"has no 'distributed:' section with keys of its own \(it has the keys strategy\)"),
        ("distributed: [1\n", "is not YAML"),
    ],
)
def test_a_file_with_double_keys_or_no_section_is_refused(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        DistributedSetup.from_yaml(path, world_size=4)


def read(tmp_path, text, world_size=4):
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return DistributedSetup.from_yaml(path, world_size=world_size)


@pytest.mark.parametrize(
    "text",
    [
        "base: &base {cp_size: 2}\ndistributed:\n  <<: *base\n",
        "distributed:\n  <<: [{cp_size: 2}, {cp_size: 4, tp_size: 1}]\n",
        "distributed:\n  cp_size: 2\n  <<: {cp_size: 4}\n",
        "all: &all {distributed: {cp_size: 2}, other: 1}\n<<: *all\n",
        "model: !Model {name: x}\nwhen: 2024-99-99\n1: one\n? [a, b]\n: c\ndistributed: {cp_size: 2}\n",
        "x: {a: 1, a: 2}\ndistributed: {cp_size: 2}\n",
        "size: &two 2\ndistributed: {cp_size: *two}\n",
        "loop: &loop [*loop]\ndistributed: {cp_size: 2}\n",
        "distributed: {cp_size: 2}\n".encode("utf-16"),
    ],
)
def test_merge_keys_work_and_other_sections_may_hold_anything(tmp_path, text):
    assert read(tmp_path, text).parallelism_sizes == ParallelismSizes(cp_size=2)


def bomb(levels):
    lists = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(["a0: &a0 [lol]", *lists, f"distributed: {{strategy: *a{levels - 1}}}"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (bomb(40), "has more than 10000 values under 'distributed:', aliases counted"),
        ("distributed: &d {extra: *d}", "has a part that contains itself at line 1"),
        ("distributed: &d {<<: *d}", "has a part that contains itself at line 1"),
        ("distributed: {<<: 3}", "merges what is no mapping at line 1"),
        ("x: " + "[" * 5000, "it nests more than 64 levels at line 1"),
        ("x: " + "[" * 5000 + "]" * 5000, "it nests more than 64 levels"),
        ("distributed: {1: 2}", r"has a key under 'distributed:' that is no text \(1\) at line 1"),
        ("distributed: {~: {}}", "that is no text"),
        ("distributed: {[a]: 2}", "that is no text"),
        ("distributed: {tp_size: !!python/object:os.system x}", "has the tag !!python/object:os.system under"),
        ("distributed: {extra: !Mine {a: 2}}", "has the tag !Mine under 'distributed:', where only plain values"),
        ("distributed: {tp_size: !!bool 7}", "has 7, which is no bool at line 1"),
        ("distributed: {tp_size: !!int two}", "has two, which is no int"),
        ("distributed: {tp_size: " + "1" * 5000 + "}", "which is no int"),
        ("distributed: {tp_size: 2024-01-01}", "tp_size must be an int from 1 up"),
        ("distributed: *nothing", "found undefined alias"),
        ("distributed: {}\n---\ndistributed: {}", "is not YAML that can be read"),
        (b"\xff\xfe\x00", "is not YAML that can be read"),
        ("a: 'caf\xe9'".encode("latin-1"), "is not YAML that can be read"),
        (b"#" * (2**20 + 1), "is larger than 1048576 bytes"),
        ("", r"has no 'distributed:' section with keys of its own \(it has no keys\)"),
        ("3", "has no 'distributed:' section"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_file_that_is_no_configuration_is_refused_in_one_sentence(tmp_path, text, message):
    with pytest.raises((ValueError, TypeError), match=message) as error:
        read(tmp_path, text)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("path", [3, None, "a\x00b"])
def test_a_path_that_is_none_is_refused(path):
    with pytest.raises((TypeError, ValueError), match=r"is no path|must be a path"):
        DistributedSetup.from_yaml(path)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"plugins": [None]}, "the name of a plugin must be text"),
        ({"plugins": {None: {}}}, "the name of a plugin must be text"),
        ({"plugins": "context"}, "plugins must be a mapping from names to options, or a list of names"),
        ({"plugins": {"context": 3}}, "plugins.context must be a mapping from options to values"),
        ({"plugins": {"context": {1: 2}}}, "plugins.context has an unknown key 1"),
        ({1: 2}, "unknown key 1 for strategy"),
        ({None: {}}, "unknown key None for strategy"),
        ({f"key{number}": 1 for number in range(10_000)}, "9980 more; valid keys"),
        ({"extra": {f"axis{number}": 2 for number in range(1000)}}, "and [0-9]+ more"),
        ({"tp_size": 2**20_000}, "tp_size must be at most 1048576 ranks"),
        ({"strategy": ["x" * 10**6] * 10}, "strategy must be the name of a strategy"),
        ({"strategy": "x" * 10**6}, "unknown strategy"),
    ],
    ids=lambda value: shown(value)[:40],
)
def test_a_section_of_the_wrong_kind_is_refused_in_a_short_message(section, message):
    with pytest.raises((ValueError, TypeError), match=message) as error:
        DistributedSetup.from_dict(section, world_size=4)
    assert len(str(error.value)) < 10_000


@attrs.frozen(eq=False)
class Mine:
    """A plugin of the user's own, which is not installed."""

    name = "mine"
    config_type = type(None)
    stage = 45
    axes = frozenset()
    composes_with = frozenset()
    config = None


def test_a_plugin_that_is_not_installed_has_no_section():
    setup = DistributedSetup.build(world_size=2, plugins=(Mine(),))
    with pytest.raises(ValueError, match="plugin 'mine' is not installed, so a section cannot name it"):
        setup.to_dict()


@pytest.mark.parametrize("command", ["plan", "explain"])
def test_the_command_line_reads_the_section(tmp_path, command):
    path = tmp_path / "config.yaml"
    path.write_text("distributed: {cp_size: 2, dp_replicate_size: 2}\n")
    result = CliRunner().invoke(app, [command, "--world-size", "8", "--config", str(path)])
    assert result.exit_code == 0, result.output
    same = CliRunner().invoke(app, [command, "--world-size", "8", "--cp", "2", "--dp-replicate", "2"])
    assert result.output == same.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "{path}", "--tp", "2"], "--config gives the strategy and every size"),
        (["--config", "{path}.gone"], "No such file"),
        (["--config", "{path}"], "unknown key 'cp_sise' for strategy 'fsdp2'; did you mean 'cp_size'"),
    ],
)
def test_the_command_line_refuses_a_wrong_section_in_one_block(tmp_path, arguments, message):
    path = tmp_path / "config.yaml"
    path.write_text("distributed: {cp_sise: 2}\n")
    arguments = [argument.format(path=path) for argument in arguments]
    result = CliRunner().invoke(app, ["plan", "--world-size", "8", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


def test_reading_a_section_imports_no_torch(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "distributed: {strategy: fsdp2, cp_size: 2, mp_policy: {param_dtype: float32}, offload_policy: cpu}\n"
    )
    code = (
        "import sys; from nemo_dist import DistributedSetup; "
        f"DistributedSetup.from_yaml({str(path)!r}, world_size=8).to_dict(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_unknown_keys_are_unknown_names():
    with pytest.raises(UnknownNameError):
        DistributedSetup.from_dict({"nonsense": 1}, world_size=1)
