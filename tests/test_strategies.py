"""What the Hypothesis strategies for authors draw: any axis, setups that build accepts, batches that a model takes."""

import math
import re
import subprocess
import sys
from functools import partial
from itertools import pairwise

import attrs
import pytest
from hypothesis import Phase, given, settings
from hypothesis import find as hypothesis_find
from hypothesis import strategies as st

from nemo_dist import DistributedSetup, MeshPlan, Role, Stage, View, hookimpl
from nemo_dist.planning.mesh_plan import Axis
from nemo_dist.testing import strategies
from nemo_dist.testing.selecting import smallest

# The first that is drawn will do: to find the smallest takes long.
find = partial(hypothesis_find, settings=settings(phases=[Phase.generate], database=None, max_examples=2000))


@attrs.frozen
class PodsConfig:
    plugin = "pods"


@attrs.frozen(eq=False)
class Pods:
    """An axis of the batch, and one that a view adds."""

    name, config_type, stage = "pods", PodsConfig, Stage.COMPILE
    axes, composes_with = frozenset({"pod", "vp", "vp_rest"}), frozenset({"fsdp2"})
    roles = {"pod": Role.BATCH}
    config: PodsConfig = attrs.field(factory=PodsConfig)

    @hookimpl
    def views(self, sizes, world_size):
        size = sizes.extra.get("vp", 1)
        within = world_size // sizes.pp_size
        if size == 1 or within % size:
            return None
        return [View("rows", (Axis("pp", sizes.pp_size), Axis("vp_rest", within // size), Axis("vp", size)))]


@pytest.mark.parametrize("axis", [*strategies.AXES, "pod", "ep"])
def test_any_axis_may_be_the_wide_one(axis):
    sizes, world = find(strategies.topologies(64, plugins=(Pods(), "moe")), lambda found: _size(*found, axis) > 1)
    assert world > 1 and sizes.problems(world) == []


def _size(sizes, world, axis):
    plan = MeshPlan.nearest(sizes, world)
    return sizes.ep_size if axis == "ep" else plan.size(axis)


def test_an_axis_of_a_view_is_drawn_where_it_is_named():
    plan = find(strategies.plans(64, axes=("dp_shard", "vp"), plugins=(Pods,)), lambda found: found.world_size > 3)
    assert any("vp" in view for view in (plan.dense, *plan.views)) or plan.size("dp_shard") == plan.world_size
    wide = find(
        strategies.plans(64, axes=("dp_shard", "vp"), plugins=(Pods,)),
        lambda found: "vp" in _wide(found) and _wide(found) <= {"dp_shard", "vp", "vp_rest"},
    )
    assert wide.view_of("vp").names == ("pp", "vp_rest", "vp")


def _wide(plan):
    return {axis.name for axis in plan.wide}


@given(topology=strategies.topologies(96, axes=("dp_shard", "pod"), plugins=(Pods(),)))
def test_only_the_axes_that_are_named_are_wide(topology):
    sizes, world = topology
    plan = MeshPlan.resolve(sizes, world)
    assert _wide(plan) <= {"dp_shard", "pod"}
    assert math.prod(axis.size for axis in plan.wide) == world and plan.size("dp") == world


@pytest.mark.parametrize("name", ["vp", "dp_shart"])
def test_an_axis_that_nobody_claims_is_refused_by_name(name):
    with pytest.raises(ValueError, match=re.escape(f"no axis {name!r} is known here")):
        find(strategies.topologies(axes=(name,)), lambda found: True)


@settings(max_examples=30)
@given(selected=strategies.selections(16, strategies=("fsdp2", "ddp"), plugins=(Pods(),)))
def test_what_is_selected_is_what_build_accepts(selected):
    setup = DistributedSetup.build(**selected)
    assert setup.plan.world_size == selected["world_size"] <= 16
    assert {plugin.name for plugin in setup.plugins} >= {"pods", setup.strategy.name}
    assert setup.strategy.name == "fsdp2" or setup.parallelism_sizes.extra.get("pod", 1) == 1  # pods lists fsdp2 alone
    policy = getattr(setup.strategy.config, "mp_policy", None)
    assert policy is None or policy["param_dtype"] == "float32"


@given(batch=strategies.batches())
def test_a_batch_has_a_label_for_every_token_and_none_for_padding(batch):
    tokens, labels = batch["input_ids"], batch["labels"]
    assert {len(row) for row in (*tokens, *labels)} == {len(tokens[0])}
    for token, label in (
        (a, b) for one, two in zip(tokens, labels, strict=True) for a, b in zip(one, two, strict=True)
    ):
        assert label in (-100, token) and (token > 0 or label == -100)
    for row, mask in zip(tokens, batch.get("attention_mask", ()), strict=False):
        assert [token > 0 for token in row] == [bool(kept) for kept in mask] and mask[0] == 1
    for positions in batch.get("position_ids", ()):
        assert all(b in (0, a + 1) for a, b in pairwise(positions)) and positions[0] == 0


@pytest.mark.parametrize("form", ["attention_mask", "position_ids"])
def test_padded_and_packed_batches_are_drawn_where_they_may_be(form):
    assert form in find(strategies.batches(), lambda batch: form in batch)
    plain = strategies.batches(rows=st.just(2), length=st.just(3), padded=False, packed=False)
    assert find(plain, lambda batch: True) == {"input_ids": [[1, 1, 1]] * 2, "labels": [[1, 1, 1]] * 2}


def test_drawing_imports_no_torch():
    code = (
        "import sys; from hypothesis import Phase, find, settings; from nemo_dist.testing import strategies as s\n"
        "first = settings(phases=[Phase.generate], database=None)\n"
        "for one in (s.plans(plugins=('moe',)), s.selections(4, ('fsdp2',)), s.batches(), s.call_orders()):\n"
        "    find(one, lambda found: True, settings=first)\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=240).returncode == 0


@pytest.mark.parametrize(
    ("name", "axis"), [("tensor", "tp"), ("context", "cp"), ("moe", "ep"), ("pipeline", "pp"), ("ddp", "dp_shard")]
)
def test_the_smallest_setup_of_a_plugin_puts_its_axis_to_work(name, axis):
    setup = DistributedSetup.build(**smallest(name), world_size=2)
    assert setup.plan.world_size == 2 == setup.plan.size(axis)
    assert name in {plugin.name for plugin in setup.plugins}
