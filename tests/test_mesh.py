"""The laws of the mesh, and its agreement with torch's DeviceMesh rank by rank."""

import itertools
import math
import pickle
import re

import attrs
import pytest
from cases import slow
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_dist.errors import TopologyError
from nemo_dist.planning.mesh_plan import Axis, MeshPlan, Role, View
from nemo_dist.planning.sizes import ParallelismSizes
from nemo_dist.testing import strategies

small_plans = strategies.plans(max_world=96)


def views_of(plan):
    return (plan.dense, *plan.views)


def axes_of(plan):
    """Every axis and flattened name of every view, with the axes that it stands for."""
    return [
        (view, name, view.flattened.get(name, (name,)))
        for view in views_of(plan)
        for name in (*view.names, *view.flattened)
    ]


def moe(ep, *, pp=1, world):
    return View("moe", (Axis("pp", pp), Axis("ep_shard", world // pp // ep), Axis("ep", ep)))


# ---- laws ----


@given(strategies.topologies())
def test_the_five_dense_axes_multiply_to_the_world_size(topology):
    sizes, world = topology
    plan = MeshPlan.resolve(sizes, world)

    assert plan.dense.names == ("pp", "dp_replicate", "dp_shard", "cp", "tp")
    assert math.prod(plan.dense.shape) == plan.dense.size == plan.world_size == world
    assert [plan.size(axis) for axis in ("pp", "cp", "tp")] == [sizes.pp_size, sizes.cp_size, sizes.tp_size]
    assert plan.size("dp_replicate") == (sizes.dp_replicate_size or 1)
    assert plan.size("dp") == sizes.dp(world)


@given(strategies.plans())
def test_the_axes_of_every_view_multiply_to_the_world(plan):
    assert {math.prod(view.shape) for view in views_of(plan)} == {plan.world_size}


@given(small_plans)
def test_every_rank_has_exactly_one_place_in_every_view(plan):
    for view in views_of(plan):
        places = [tuple(plan.coordinates(rank, view.name).items()) for rank in range(plan.world_size)]
        everywhere = itertools.product(*([(axis.name, place) for place in range(axis.size)] for axis in view.axes))

        assert places == list(everywhere)


@given(strategies.plans(max_world=100_000), st.data())
def test_a_rank_is_found_again_at_its_coordinates(plan, data):
    rank = data.draw(st.integers(0, plan.world_size - 1))

    for view in views_of(plan):
        assert plan.rank_at(plan.coordinates(rank, view.name), view.name) == rank


@given(small_plans)
def test_the_groups_along_every_axis_partition_the_world(plan):
    for view, name, _ in axes_of(plan):
        groups = list(plan.groups(name))

        assert sorted(rank for group in groups for rank in group) == list(range(plan.world_size))
        assert {len(group) for group in groups} == {plan.size(name)} == {view.size_of(name)}
        assert groups == sorted(groups)


@given(small_plans, st.data())
def test_the_group_of_a_rank_differs_from_it_only_in_that_axis(plan, data):
    rank = data.draw(st.integers(0, plan.world_size - 1))

    for view, name, parts in axes_of(plan):
        places = {other: plan.coordinates(other, view.name) for other in range(plan.world_size)}
        kept = [axis for axis in view.names if axis not in parts]
        alike = [other for other in places if all(places[other][axis] == places[rank][axis] for axis in kept)]

        assert plan.group_of(rank, name) == tuple(sorted(alike, key=lambda other: [places[other][p] for p in parts]))
        assert plan.group_of(rank, name) in plan.groups(name)


@given(strategies.plans())
def test_a_flattened_axis_is_the_product_of_its_parts_in_order(plan):
    for view, name, parts in axes_of(plan):
        group = plan.group_of(0, name)
        places = [tuple(plan.coordinates(rank, view.name)[part] for part in parts) for rank in group]

        assert view.size_of(name) == math.prod(view.size_of(part) for part in parts)
        assert places == list(itertools.product(*(range(view.size_of(part)) for part in parts)))


@given(small_plans, st.data())
def test_ranks_share_a_batch_exactly_when_their_dp_coordinates_match(plan, data):
    rank = data.draw(st.integers(0, plan.world_size - 1))
    place = {other: plan.coordinates(other) for other in range(plan.world_size)}
    key = {other: (place[other]["dp_replicate"], place[other]["dp_shard"]) for other in place}

    assert plan.batch_ranks(rank) == tuple(other for other in place if key[other] == key[rank])
    assert {plan.dp_rank(other) for other in plan.batch_ranks(rank)} == {plan.dp_rank(rank)}


@given(small_plans)
def test_every_batch_is_read_by_as_many_ranks_as_share_a_replica(plan):
    readers = [plan.dp_rank(rank) for rank in range(plan.world_size)]

    assert set(readers) == set(range(plan.size("dp")))
    assert {readers.count(batch) for batch in set(readers)} == {plan.world_size // plan.size("dp")}


@given(strategies.plans(max_world=24, max_views=1, max_own=2), st.data())
def test_axes_of_third_parties_join_ours_of_their_role(plan, data):
    """Layers are outermost, then batch, sequence, parameters; ranks with equal places on batch axes share a batch."""
    order = [Role.LAYERS, Role.BATCH, Role.SEQUENCE, Role.PARAMETERS]
    roles = [axis.role for axis in plan.dense.axes]
    rank = data.draw(st.integers(0, plan.world_size - 1))
    place = {other: plan.coordinates(other) for other in range(plan.world_size)}
    key = {other: [place[other][axis] for axis in plan.dense.splitting(Role.BATCH)] for other in place}

    assert roles == sorted(roles, key=order.index)
    assert math.prod(plan.splitting(role) for role in order) == plan.world_size
    assert plan.size("dp") == plan.splitting(Role.BATCH) and plan.size("dp_cp") == plan.splitting(Role.TOKENS)
    assert plan.batch_ranks(rank) == tuple(other for other in place if key[other] == key[rank])
    assert {plan.dp_rank(other) for other in place} == set(range(plan.size("dp")))


@given(strategies.plans())
def test_wide_axes_are_those_above_1_each_listed_once_dense_first(plan):
    found = [(axis.name, axis.size) for axis in plan.wide]
    names = list(dict.fromkeys(name for view in views_of(plan) for name in view.names))

    assert found == [(name, plan.size(name)) for name in names if plan.size(name) > 1]


@given(strategies.plans())
def test_an_equal_plan_is_the_same_key_and_survives_a_pickle(plan):
    again = pickle.loads(pickle.dumps(plan))

    assert again == plan
    assert {plan: "found"}[again] == "found"
    assert attrs.evolve(plan) == plan


@given(strategies.topologies(), st.integers(1, 8))
def test_plans_of_other_sizes_are_other_keys(topology, factor):
    sizes, world = topology
    other = attrs.evolve(sizes, tp_size=sizes.tp_size * factor)

    assert (MeshPlan.resolve(sizes, world) == MeshPlan.resolve(other, world * factor)) == (factor == 1)


def test_questions_about_one_rank_do_not_enumerate_the_others():
    """A trillion ranks: an answer that walked over them would never come."""
    world = 2**40
    plan = MeshPlan.resolve(ParallelismSizes(tp_size=8, pp_size=4, cp_size=2), world, [moe(16, pp=4, world=world)])
    last = world - 1

    assert plan.coordinates(last) == {axis.name: axis.size - 1 for axis in plan.dense.axes}
    assert plan.rank_at(plan.coordinates(last)) == last
    assert plan.group_of(last, "tp") == tuple(range(last - 7, world))
    assert plan.group_of(last, "ep") == tuple(range(last - 15, world))
    assert len(plan.batch_ranks(last)) == 8 * 4 * 2
    assert plan.dp_rank(last) == plan.size("dp") - 1
    assert next(iter(plan.groups("cp"))) == (0, 8)


# ---- the nearest plan ----


@given(strategies.topologies())
def test_the_nearest_plan_of_sizes_that_fit_is_their_plan(topology):
    assert MeshPlan.nearest(*topology) == MeshPlan.resolve(*topology)


@given(
    st.builds(
        ParallelismSizes,
        **dict.fromkeys(("tp_size", "pp_size", "cp_size", "ep_size"), st.integers(1, 8)),
        **dict.fromkeys(("dp_size", "dp_replicate_size"), st.none() | st.integers(1, 16)),
    ),
    st.integers(1, 256),
)
def test_the_nearest_plan_never_raises_and_keeps_the_sizes_asked_for(sizes, world):
    plan = MeshPlan.nearest(sizes, world)

    assert [plan.size(axis) for axis in ("pp", "cp", "tp")] == [sizes.pp_size, sizes.cp_size, sizes.tp_size]
    assert plan.size("dp_replicate") == (sizes.dp_replicate_size or 1)
    assert plan.dense.size == plan.world_size


# ---- views ----


def test_a_view_may_share_leading_axes_with_the_dense_view():
    plan = MeshPlan.resolve(ParallelismSizes(pp_size=2, tp_size=2, ep_size=4), 16, [moe(4, pp=2, world=16)])

    assert [(axis.name, axis.size) for axis in plan.wide] == [
        ("pp", 2),
        ("dp_shard", 4),
        ("tp", 2),
        ("ep_shard", 2),
        ("ep", 4),
    ]
    assert plan.view_of("pp") is plan.dense
    assert plan.view_of("ep").name == "moe"
    assert plan.coordinates(13, "moe") == {"pp": 1, "ep_shard": 1, "ep": 1}
    assert list(plan.groups("ep")) == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11), (12, 13, 14, 15)]
    assert plan.group_of(13, "ep_shard") == (9, 13)


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (View("moe", (Axis("ep_shard", 2), Axis("ep", 3))), "view 'moe' (ep_shard 2, ep 3) has 6 ranks, but the world"),
        (View("moe", (Axis("pp", 1), Axis("ep", 8))), "(pp 2, dp_replicate 1, dp_shard 2, cp 1, tp 2) both have pp;"),
        (View("moe", (Axis("ep", 4), Axis("tp", 2))), "both have tp; views may share only their leading axes"),
        (View("moe", (Axis("ep", 4), Axis("pp", 2))), "both have pp; views may share only their leading axes"),
        (View("moe", (Axis("dp", 2), Axis("ep", 4))), "both have dp; views may share only their leading axes"),
        (View("moe", (Axis("a", 2), Axis("ep", 4)), {"tp": ("a", "ep")}), "both have tp;"),
        (View("dense", (Axis("a", 2), Axis("ep", 4))), "2 views are called 'dense'; give each its own name"),
    ],
)
def test_a_view_that_contradicts_the_dense_one_is_refused(view, message):
    with pytest.raises(TopologyError, match=re.escape(message)) as caught:
        MeshPlan.resolve(ParallelismSizes(pp_size=2, tp_size=2), 8, [view])

    assert len(caught.value.problems) == 1


def test_views_that_contradict_each_other_are_refused():
    one, other = View("one", (Axis("a", 2), Axis("b", 4))), View("other", (Axis("b", 4), Axis("c", 2)))

    with pytest.raises(TopologyError, match=r"view 'other' \(b 4, c 2\) and view 'one' \(a 2, b 4\) both have b;"):
        MeshPlan.resolve(ParallelismSizes(), 8, [one, other])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"ep_size": 2}, "axis 'ep' has size 2, but no view has it; select a plugin that adds it, or drop it"),
        ({"extra": {"ring": 4}}, "axis 'ring' has size 4, but no view has it; select a plugin that adds it, or drop"),
        ({"extra": {"sail": 4}}, "axis 'sail' has size 4, but view 'boat' (mast 4, sail 2) gives it 2; the plugin"),
        ({"extra": {"dp_shard": 8}}, "extra axis 'dp_shard' is an axis of the dense mesh, whose sizes have their own"),
    ],
)
def test_an_axis_that_no_view_has_at_that_size_is_refused(sizes, message):
    boat = View("boat", (Axis("mast", 4), Axis("sail", 2)))

    with pytest.raises(TopologyError, match=re.escape(message)):
        MeshPlan.resolve(ParallelismSizes(**sizes), 8, [boat])


def test_everything_that_is_wrong_is_raised_at_once():
    sizes = ParallelismSizes(tp_size=4, dp_size=4, dp_replicate_size=3, extra={"ring": 2})

    with pytest.raises(TopologyError) as caught:
        MeshPlan.resolve(sizes, 10, [View("moe", (Axis("ep", 7),)), View("moe", (Axis("tp", 10),))])

    assert [problem.partition(";")[0] for problem in caught.value.problems] == [
        "world_size 10 is not divisible by pp_size * cp_size * tp_size = 1 * 1 * 4 = 4",
        "dp_size * pp_size * cp_size * tp_size = 4 * 1 * 1 * 4 = 16, but world_size is 10",
        "dp_replicate_size 3 does not divide the data-parallel size 4",
        "view 'moe' (ep 7) has 7 ranks, but the world has 10",
        "2 views are called 'moe'",
        "view 'moe' (tp 10) and view 'dense' (pp 1, dp_replicate 3, dp_shard 1, cp 1, tp 4) both have tp",
        "axis 'ring' has size 2, but no view has it",
    ]
    assert all(problem in str(caught.value) for problem in caught.value.problems)


def test_sizes_that_do_not_fit_are_reported_once():
    """The plugin made its view from the same wrong sizes: 8 of 10 ranks."""
    with pytest.raises(TopologyError) as caught:
        MeshPlan.resolve(ParallelismSizes(tp_size=4, ep_size=2), 10, [moe(2, world=8)])

    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Axis("e p", 2), "the name of an axis or view must be a Python identifier (got 'e p')"),
        (lambda: Axis("ep", 0), "the size of axis 'ep' must be an int from 1 up (got 0)"),
        (lambda: View("", (Axis("ep", 2),)), "the name of an axis or view must be a Python identifier (got '')"),
        (lambda: View("v", ()), "view 'v' must have axes, each name once (got [])"),
        (lambda: View("v", (Axis("a", 1), Axis("a", 1))), "view 'v' must have axes, each name once (got ['a', 'a'])"),
        (
            lambda: View("v", (Axis("a", 2),), {"a": ("a",)}),
            "view 'v': 'a' is an axis; give the flattened axes another",
        ),
        (lambda: View("v", (Axis("a", 2),), {"b": ()}), "view 'v': 'b' must flatten consecutive axes in order (got ()"),
        (
            lambda: View("v", (Axis("a", 2), Axis("b", 2), Axis("c", 2)), {"d": ("a", "c")}),
            "view 'v': 'd' must flatten consecutive axes in order (got ('a', 'c') of ('a', 'b', 'c'))",
        ),
        (
            lambda: View("v", (Axis("a", 2), Axis("b", 2)), {"d": ("b", "a")}),
            "view 'v': 'd' must flatten consecutive axes in order (got ('b', 'a') of ('a', 'b'))",
        ),
        (
            lambda: View("v", (Axis("a", 2),), {"d": ("e",)}),
            "view 'v': 'd' must flatten consecutive axes in order (got ('e',) of ('a',))",
        ),
    ],
)
def test_an_invalid_axis_or_view_is_refused(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_the_size_of_an_axis_is_a_whole_number():
    with pytest.raises(TypeError, match=re.escape("the size of axis 'ep' must be an int from 1 up (got 2.0 of type")):
        Axis("ep", 2.0)


# ---- wrong questions ----

PLAN = MeshPlan.resolve(ParallelismSizes(tp_size=2, ep_size=2), 8, [moe(2, world=8)])
HOME = {"pp": 0, "dp_replicate": 0, "dp_shard": 3, "cp": 0, "tp": 1}


@pytest.mark.parametrize("ask", [PLAN.size, PLAN.view_of, PLAN.groups, lambda axis: PLAN.group_of(0, axis)])
def test_an_unknown_axis_is_refused_with_the_near_match_and_all_names(ask):
    with pytest.raises(ValueError, match=r"the mesh has no axis 'dp_shad'; did you mean 'dp_shard'\?") as caught:
        ask("dp_shad")

    listed = str(caught.value).partition("(axes: ")[2].rstrip(")").split(", ")
    assert sorted(listed) == sorted({name for _, name, _ in axes_of(PLAN)})


@pytest.mark.parametrize("ask", [PLAN.coordinates, lambda _, view: PLAN.rank_at(HOME, view)])
def test_an_unknown_view_is_refused_with_the_near_match_and_all_names(ask):
    with pytest.raises(ValueError, match=re.escape("no view 'mo'; did you mean 'moe'? (views: dense, moe)")):
        ask(0, "mo")


@pytest.mark.parametrize(
    "ask", [PLAN.coordinates, PLAN.dp_rank, PLAN.batch_ranks, lambda rank: PLAN.group_of(rank, "tp")]
)
@pytest.mark.parametrize(("rank", "error"), [(8, ValueError), (-1, ValueError), (True, TypeError), (1.0, TypeError)])
def test_a_rank_that_does_not_exist_is_refused(ask, rank, error):
    with pytest.raises(error, match=rf"rank must be an int from 0 to 7 \(got {rank}"):
        ask(rank)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tp": 2}, ValueError, "coordinate 'tp' must be an int from 0 to 1 (got 2)"),
        ({"tp": -1}, ValueError, "coordinate 'tp' must be an int from 0 to 1 (got -1)"),
        ({"tp": True}, TypeError, "coordinate 'tp' must be an int from 0 to 1 (got True of type bool)"),
        ({"ep": 0}, ValueError, "view 'dense' has no axis 'ep'"),
        ({"dp": 0}, ValueError, "view 'dense' has no axis 'dp'"),
        ({"dp_shad": 0}, ValueError, "view 'dense' has no axis 'dp_shad'; did you mean 'dp_shard'? (axes: pp, dp_re"),
    ],
)
def test_coordinates_that_name_no_rank_are_refused(change, error, message):
    assert PLAN.rank_at(HOME) == 7
    with pytest.raises(error, match=re.escape(message)):
        PLAN.rank_at(HOME | change)


def test_coordinates_that_leave_axes_out_are_refused():
    with pytest.raises(ValueError, match=re.escape("must name every axis of view 'dense' (missing: pp, cp, tp)")):
        PLAN.rank_at({"dp_replicate": 0, "dp_shard": 3})


def test_a_plan_that_contradicts_itself_cannot_be_made():
    with pytest.raises(TopologyError, match=r"view 'dense' .* has 8 ranks, but the world has 9"):
        MeshPlan(9, PLAN.dense)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        PLAN.world_size = 9


# ---- agreement with torch ----


@pytest.fixture
def torch_meshes():
    """Give ``torch_meshes(plan, rank)``: the DeviceMesh of every view and flattened name, as *rank* sees them."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def make(plan, rank):
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", rank=rank, world_size=plan.world_size, store=FakeStore())
        meshes = {}
        for view in views_of(plan):
            mesh = init_device_mesh("cpu", view.shape, mesh_dim_names=view.names)
            flat = {name: mesh[tuple(run)]._flatten(name) for name, run in view.flattened.items() if len(run) > 1}
            meshes[view.name] = mesh, flat
        return meshes

    yield make
    if dist.is_initialized():
        dist.destroy_process_group()


def assert_torch_agrees(plan, rank, meshes):
    import torch.distributed as dist

    for view in views_of(plan):
        mesh, flat = meshes[view.name]
        assert tuple(plan.coordinates(rank, view.name).values()) == tuple(mesh.get_coordinate())
        for name in view.names:
            assert plan.group_of(rank, name) == tuple(dist.get_process_group_ranks(mesh.get_group(name)))
        for name, mesh_of_run in flat.items():
            assert plan.group_of(rank, name) == tuple(dist.get_process_group_ranks(mesh_of_run.get_group()))
            assert plan.group_of(rank, name) == tuple(mesh_of_run.mesh.tolist())


@pytest.mark.parametrize(
    ("sizes", "world", "pp"),
    [
        (ParallelismSizes(), 1, 1),
        (ParallelismSizes(ep_size=3), 12, 1),
        (ParallelismSizes(pp_size=2, dp_replicate_size=2, cp_size=3, tp_size=2, ep_size=6), 72, 2),
        slow(ParallelismSizes(pp_size=2, dp_replicate_size=2, cp_size=2, tp_size=8, ep_size=32), 512, 2),
    ],
    ids=["1 rank", "12 ranks", "72 ranks", "512 ranks"],
)
def test_torch_agrees_on_every_rank(torch_meshes, sizes, world, pp):
    plan = MeshPlan.resolve(sizes, world, [moe(sizes.ep_size, pp=pp, world=world)])

    for rank in range(world):
        assert_torch_agrees(plan, rank, torch_meshes(plan, rank))


def test_torch_agrees_on_any_plan(torch_meshes):
    @settings(max_examples=60)
    @given(strategies.plans(max_world=512), st.data())
    def agree(plan, data):
        rank = data.draw(st.integers(0, plan.world_size - 1))
        meshes = torch_meshes(plan, rank)
        assert_torch_agrees(plan, rank, meshes)
        for view in views_of(plan):  # what rank sees of the others
            everyone = meshes[view.name][0].mesh
            for other in range(plan.world_size):
                assert everyone[tuple(plan.coordinates(other, view.name).values())] == other

    agree()
