"""A search finds every topology that ``build`` accepts, each once, and says clearly what it cannot do."""

import subprocess
import sys
from itertools import islice, product
from typing import ClassVar

import attrs
import pytest
from cases import cases, slow

from nemo_dist import (
    Axis,
    DistributedSetup,
    ParallelismSizes,
    Role,
    Stage,
    TopologyError,
    UnknownNameError,
    View,
    hookimpl,
)
from nemo_dist.plugin.registry import Registry
from nemo_dist.search.enumeration import topologies
from nemo_dist.search.hardware import Hardware, parse_bytes
from nemo_dist.search.paste import call_text, section_text
from nemo_dist.search.space import Space, divisors
from nemo_dist.setup.config_section import build_keywords

AXES = ("pp_size", "dp_replicate_size", "cp_size", "tp_size", "ep_size")
MODES = (False, "selective", True)


def key(strategy, sizes, mode, plugins=()):
    asked = {name: getattr(sizes, name) for name in AXES} | dict(sizes.extra)
    wide = tuple(sorted((name, size) for name, size in asked.items() if size not in (None, 1)))
    return getattr(strategy, "plugin", strategy), wide, mode, tuple(map(repr, plugins))


def enumerated(**space):
    return [
        key(one.strategy, one.parallelism_sizes, one.activation_checkpointing, one.plugins)
        for one in topologies(Space(**space))
    ]


def accepted(world, strategies, modes, numbers, plugins=(), extra=(), narrow=()):
    """Every tuple of sizes out of *numbers* that ``build`` accepts, with every strategy and mode; *narrow* stay 1."""
    registry, found = Registry(), set()
    for tuple_of_sizes in product(numbers, repeat=len(AXES) + len(extra)):
        own = {axis: size for axis, size in zip(extra, tuple_of_sizes[len(AXES) :], strict=True) if size > 1}
        named = {name: size for name, size in zip(AXES, tuple_of_sizes, strict=False) if size > 1}
        sizes = ParallelismSizes(**named, extra=own)
        if any(name in named for name in narrow) or (not extra and sizes.problems(world)):
            continue  # what `build` says first, and quickest
        for strategy, mode in product(strategies, modes):
            try:
                DistributedSetup.build(
                    strategy, sizes, activation_checkpointing=mode, world_size=world, plugins=plugins, registry=registry
                )
            except TopologyError:
                continue
            found.add(key(strategy, sizes, mode, plugins))
    return found


def strategies():
    registry = Registry()
    return [name for name in registry if registry.stage(name) == Stage.DATA]


@cases(
    ("world", "modes"),
    [(1, MODES), slow(6, MODES), (8, (False,)), *(slow(world, (False,)) for world in (12, 30, 64, 96, 128))],
    lambda world, modes: f"{world} ranks",
)
def test_enumeration_is_every_tuple_that_build_accepts(world, modes):
    found = enumerated(world_size=world, modes=modes, options=False)
    numbers = range(1, world + 1) if world <= 6 else divisors(world)

    assert len(found) == len(set(found))
    assert set(found) == accepted(world, strategies(), modes, numbers)


@attrs.frozen(eq=False)
class Folded:
    """A third party's plugin with an axis in the dense mesh, which takes at most 2 ranks, and one in a view."""

    name: ClassVar[str] = "folded"
    config_type: ClassVar[type] = dict
    stage: ClassVar[int] = Stage.CONTEXT + 1
    axes: ClassVar[frozenset[str]] = frozenset({"fold", "crease"})
    composes_with: ClassVar[frozenset[str]] = frozenset({"fsdp2"})
    roles: ClassVar = {"fold": Role.SEQUENCE}
    config: dict = attrs.field(factory=dict)

    @hookimpl
    def views(self, sizes, world_size):
        crease = sizes.extra.get("crease", 1)
        return [View("creased", (Axis("rest", world_size // crease), Axis("crease", crease)))] if crease > 1 else None

    @hookimpl
    def validate(self, plan):
        fold = plan.size("fold") if "fold" in plan.dense else 1
        return [f"axis 'fold' takes at most 2 ranks (got {fold})"] if fold > 2 else []


def test_axes_of_a_third_party_are_enumerated_too():
    own = (Folded(),)
    found = enumerated(
        world_size=4,
        modes=(False,),
        options=False,
        plugins=own,
        strategies=("fsdp2",),
        fixed={"ep": 1, "cp": 1, "pp": 1},
    )
    without = ("ep_size", "cp_size", "pp_size")
    expected = accepted(4, ["fsdp2"], (False,), (1, 2, 4), plugins=own, extra=("fold", "crease"), narrow=without)

    assert set(found) == expected
    assert len(found) == len(expected)
    assert any({"fold", "crease"} <= dict(wide).keys() for _, wide, _, _ in found)


def test_options_that_plugins_find_worth_trying_are_tried_once_each():
    found = enumerated(world_size=4, modes=(False,), strategies=("fsdp2",), fixed={"tp": 2, "ep": 1, "cp": 1})
    texts = [" ".join(plugins) for _, _, _, plugins in found]

    assert len(found) == len(set(found))
    assert any("sequence_parallel=True" in text for text in texts)
    assert any("Interleaved1F1B" in text for text in texts)


def test_what_is_fixed_and_bounded_stays_so():
    for one in topologies(Space(world_size=16, fixed={"dp": 4}, bounds={"tp": 2}, options=False)):
        assert one.plan.size("dp") == 4
        assert one.plan.size("tp") <= 2


def test_an_axis_that_nobody_has_is_named():
    with pytest.raises(ValueError, match=r"no axis 'dp_replicat' can be searched; did you mean 'dp_replicate'\?"):
        Space(world_size=4, fixed={"dp_replicat": 2})


def test_enumeration_is_lazy_and_needs_no_torch():
    script = (
        "import sys; from itertools import islice\n"
        "from nemo_dist.search.enumeration import topologies; from nemo_dist.search.space import Space\n"
        "print(len(list(islice(topologies(Space(world_size=16384)), 100))), 'torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240, check=True)

    assert ran.stdout.split() == ["100", "False"]


def test_what_is_pasted_builds_the_topology():
    for one in islice(topologies(Space(world_size=8, strategies=("fsdp2",))), 0, None, 101):
        names: dict = {}
        exec(call_text(one).replace("DistributedSetup.build(", "DistributedSetup.build(world_size=8, "), names)
        section = section_text(one)
        again = DistributedSetup.from_dict(__import__("yaml").safe_load(section)["distributed"], world_size=8)

        assert names["setup"].describe() == one.build().describe() == again.describe()
        assert build_keywords(again.to_dict(), Registry())


def test_a_strategy_is_not_chosen_in_silence():
    with pytest.raises(UnknownNameError, match=r"strategy 'auto' is refused.*nemo-dist search"):
        DistributedSetup.build(strategy="auto", world_size=4)


# ---- hardware and units ----


@pytest.mark.parametrize(
    ("text", "expected"), [("80GiB", 80 * 2**30), ("80 gb", 80 * 10**9), ("1.5MiB", 3 * 2**19), (4096, 4096)]
)
def test_bytes_have_units(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["80GiBs", "80 potatoes", "", "GiB", "-3GiB", "0GiB", "9" * 5000])
def test_an_unknown_unit_is_refused_with_those_that_are_known(text):
    with pytest.raises(ValueError, match=r"units: B, KB|a number of bytes from 1 up"):
        parse_bytes(text)


def test_unknown_hardware_is_refused_with_the_nearest_name():
    with pytest.raises(UnknownNameError, match=r"unknown hardware 'h100-8'; did you mean 'h100-8x'\?"):
        Hardware.named("h100-8")


def test_hardware_of_ones_own_comes_from_a_file(tmp_path):
    from nemo_dist.search.hardware import FILE

    mine = tmp_path / "mine.yaml"
    mine.write_text(FILE.read_text().replace("a100-8x:", "mine:").replace("device: A100", "device: A30"))

    found = Hardware.named(f"{mine}:mine")

    assert (found.peak("bfloat16"), found.peak("float16"), found.peak("float32")) == (165e12, 165e12, 19.5e12)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("node: 8", "node: 0"), "node must be an int from 1 up"),
        (("between: 50.0e+9", "between: 0"), "between must be a number above 0"),
        (("  latency_between: 30.0e-6\n", ""), "hardware 'h100-8x' of .*latency_between"),
        (("flops: {float32: 67.0e+12}", "flops: {}"), "flops must map names"),
        (("h100-8x:", "h100-8x: 3\nother:"), "hardware 'h100-8x' of .* must map names to numbers"),
        (("node: 8", "node: !!int x"), "is no int"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_hardware_that_makes_no_sense_is_refused_in_words(tmp_path, change, words):
    from nemo_dist.search.hardware import FILE

    mine = tmp_path / "mine.yaml"
    mine.write_text(FILE.read_text().replace(*change, 1))
    with pytest.raises(ValueError, match=words):
        Hardware.named(f"{mine}:h100-8x")


def test_a_group_across_nodes_is_slower_than_one_within():
    hardware = Hardware.named("h100-8x")
    within = DistributedSetup.build(parallelism_sizes=ParallelismSizes(tp_size=8), world_size=16).plan
    across = DistributedSetup.build(parallelism_sizes=ParallelismSizes(tp_size=16), world_size=16).plan

    assert hardware.seconds(across, "tp", 1e9, 0) == pytest.approx(hardware.seconds(within, "tp", 1e9, 0) * 450 / 400)
    assert hardware.seconds(within, "dp_shard", 1e9, 0) == pytest.approx(1e9 / (50e9 * 0.8))
