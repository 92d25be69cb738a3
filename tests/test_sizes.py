"""What a user may ask for, and what the answer says when it cannot be had."""

import copy
import pickle
import re

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_dist.planning.sizes import ParallelismSizes
from nemo_dist.testing import strategies

REQUIRED = ("tp_size", "pp_size", "cp_size", "ep_size")
OPTIONAL = ("dp_size", "dp_replicate_size")

sizes_of_any_kind = st.builds(
    ParallelismSizes,
    **dict.fromkeys(REQUIRED, st.integers(1, 8)),
    **dict.fromkeys(OPTIONAL, st.none() | st.integers(1, 16)),
)


def test_every_size_that_is_left_out_is_1_and_dp_is_what_remains():
    sizes = ParallelismSizes()

    assert [getattr(sizes, field) for field in REQUIRED] == [1, 1, 1, 1]
    assert [getattr(sizes, field) for field in OPTIONAL] == [None, None]
    assert sizes.extra == {}
    assert sizes.dp(48) == 48


@pytest.mark.parametrize("field", [*REQUIRED, *OPTIONAL])
@pytest.mark.parametrize("value", [True, False, 2.0, "2", (2,), b"2"])
def test_a_size_of_another_type_is_refused_by_name(field, value):
    with pytest.raises(TypeError) as caught:
        ParallelismSizes(**{field: value})

    assert str(caught.value) == f"{field} must be an int from 1 up (got {value!r} of type {type(value).__name__})"


@pytest.mark.parametrize("field", [*REQUIRED, *OPTIONAL])
@pytest.mark.parametrize("value", [0, -1, -8])
def test_a_size_below_1_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=re.escape(f"{field} must be an int from 1 up (got {value})")):
        ParallelismSizes(**{field: value})


@pytest.mark.parametrize("field", REQUIRED)
def test_only_the_data_parallel_sizes_may_be_none(field):
    assert [getattr(ParallelismSizes(**{name: None}), name) for name in OPTIONAL] == [None, None]
    with pytest.raises(TypeError, match=rf"{field} must be an int from 1 up \(got None of type NoneType\)"):
        ParallelismSizes(**{field: None})


def test_sizes_are_named_never_positional():
    with pytest.raises(TypeError, match="positional"):
        ParallelismSizes(2)


def test_sizes_do_not_change():
    sizes = ParallelismSizes(extra={"ring": 2})

    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        sizes.tp_size = 2
    with pytest.raises(TypeError, match="does not support item assignment"):
        sizes.extra["ring"] = 3


def test_sizes_keep_their_own_copy_of_extra():
    declared = {"ring": 2}
    sizes = ParallelismSizes(extra=declared)
    declared["ring"] = 3

    assert sizes.extra == {"ring": 2}


@given(sizes_of_any_kind, st.dictionaries(st.sampled_from(("ring", "sail", "tent")), st.integers(1, 8)))
def test_equal_sizes_are_one_key_and_survive_a_pickle(sizes, extra):
    first = attrs.evolve(sizes, extra=extra)
    second = attrs.evolve(sizes, extra=dict(reversed(extra.items())))

    assert {first: "found"}[second] == "found"
    assert pickle.loads(pickle.dumps(first)) == first
    assert hash(pickle.loads(pickle.dumps(first))) == hash(first)
    assert copy.deepcopy(first) == first


@pytest.mark.parametrize(
    ("extra", "error", "message"),
    [
        ({"ring": 0}, ValueError, "extra['ring'] must be an int from 1 up (got 0)"),
        ({"ring": True}, TypeError, "extra['ring'] must be an int from 1 up (got True of type bool)"),
        ({"ring": None}, TypeError, "extra['ring'] must be an int from 1 up (got None of type NoneType)"),
        ({"a b": 2}, ValueError, "extra must be keyed by axis names that are Python identifiers (got 'a b')"),
        ({3: 2}, TypeError, "extra must be keyed by axis names (got 3 of type int)"),
        ({"tp": 2}, ValueError, "extra['tp'] repeats a size that has its own field; pass tp_size=2 instead"),
        ({"ep_size": 2}, ValueError, "extra['ep_size'] repeats a size that has its own field; pass ep_size=2 instead"),
        ([("ring", 2)], TypeError, "extra must be a mapping from axis names to sizes (got [('ring', 2)] of type list)"),
        (None, TypeError, "extra must be a mapping from axis names to sizes (got None of type NoneType)"),
    ],
)
def test_a_wrong_extra_axis_is_refused_by_name(extra, error, message):
    with pytest.raises(error, match=re.escape(message)):
        ParallelismSizes(extra=extra)


@pytest.mark.parametrize("query", [ParallelismSizes().dp, ParallelismSizes().problems])
@pytest.mark.parametrize(("world", "error"), [(0, ValueError), (-4, ValueError), (True, TypeError), (8.0, TypeError)])
def test_the_number_of_ranks_is_checked_like_a_size(query, world, error):
    with pytest.raises(error, match=rf"world_size must be an int from 1 up \(got {world}"):
        query(world)


@given(strategies.topologies())
def test_sizes_that_multiply_to_the_world_have_no_problem(topology):
    sizes, world = topology

    assert sizes.problems(world) == []
    assert sizes.dp(world) * sizes.pp_size * sizes.cp_size * sizes.tp_size == world


@given(sizes_of_any_kind, st.integers(1, 256))
def test_a_problem_is_reported_exactly_when_the_arithmetic_fails(sizes, world):
    model = sizes.pp_size * sizes.cp_size * sizes.tp_size
    dp = sizes.dp_size or world / model
    replicate = sizes.dp_replicate_size or 1
    fits = (
        dp * model == world
        and dp == int(dp)
        and dp % replicate == 0
        and (replicate == 1 or replicate < dp or model > 1)
    )

    assert (not sizes.problems(world)) == fits


@given(sizes_of_any_kind, st.integers(1, 256))
def test_inferred_dp_is_rounded_down_and_at_least_1(sizes, world):
    inferred = attrs.evolve(sizes, dp_size=None).dp(world)
    model = sizes.pp_size * sizes.cp_size * sizes.tp_size

    assert inferred >= 1
    assert inferred * model <= max(world, model)
    assert world < (inferred + 1) * model


@given(sizes_of_any_kind, st.integers(1, 256))
def test_the_ranks_that_a_problem_says_to_start_do_fit(sizes, world):
    for problem in sizes.problems(world):
        for ranks in re.findall(r"(\d+)(?= or \d+ ranks| ranks$| ranks,)", problem):
            assert problem.partition(" ")[0] not in [other.partition(" ")[0] for other in sizes.problems(int(ranks))]


@given(sizes_of_any_kind, st.integers(1, 256))
def test_the_dp_size_that_a_problem_says_to_infer_is_inferred(sizes, world):
    inferring = attrs.evolve(sizes, dp_size=None, dp_replicate_size=None)
    for problem in sizes.problems(world):
        for dp in re.findall(r"leave dp_size out to get (\d+)", problem):
            assert inferring.problems(world) == []
            assert inferring.dp(world) == int(dp)


@given(st.integers(2, 64), st.integers(1, 256))
def test_the_dp_replicate_size_that_a_problem_says_to_use_does_fit(replicate, world):
    for problem in ParallelismSizes(dp_replicate_size=replicate).problems(world):
        for better in re.findall(r"(\d+)(?= or \d+,|, or leave)", problem):
            assert ParallelismSizes(dp_replicate_size=int(better)).problems(world) == []


def test_a_world_that_does_not_divide_is_shown_with_its_factors():
    assert ParallelismSizes(tp_size=4, pp_size=2).problems(20) == [
        "world_size 20 is not divisible by pp_size * cp_size * tp_size = 2 * 1 * 4 = 8; "
        "start 16 or 24 ranks, or choose sizes whose product divides 20"
    ]


def test_a_world_that_is_too_small_is_shown_the_smallest_that_fits():
    (problem,) = ParallelismSizes(tp_size=4, pp_size=2).problems(6)

    assert "start 8 ranks" in problem


def test_a_dp_size_that_leaves_ranks_over_is_shown_with_the_product():
    assert ParallelismSizes(dp_size=3, tp_size=2).problems(8) == [
        "dp_size * pp_size * cp_size * tp_size = 3 * 1 * 1 * 2 = 6, but world_size is 8; "
        "leave dp_size out to get 4, or start 6 ranks"
    ]


def test_replicas_that_do_not_divide_dp_are_shown_what_does():
    assert ParallelismSizes(dp_replicate_size=5).problems(12) == [
        "dp_replicate_size 5 does not divide the data-parallel size 12, which is world_size / (pp_size * cp_size * "
        "tp_size); use 4 or 6, or leave it out"
    ]


def test_pure_replicas_are_pointed_to_ddp():
    (problem,) = ParallelismSizes(dp_size=4, dp_replicate_size=4).problems(4)

    assert problem == (
        "dp_replicate_size 4 equals the data-parallel size: that leaves dp_shard 1, which is pure replicas; "
        "lower it, leave it out, or use a strategy that only replicates"
    )


def test_all_problems_are_reported_at_once():
    problems = ParallelismSizes(tp_size=4, dp_size=4, dp_replicate_size=3).problems(10)

    assert [problem.partition(" ")[0] for problem in problems] == ["world_size", "dp_size", "dp_replicate_size"]


def test_dp_is_not_checked_when_the_world_does_not_divide():
    (problem,) = ParallelismSizes(tp_size=4, dp_replicate_size=3).problems(10)

    assert problem.startswith("world_size 10 is not divisible")


def test_ep_and_extra_are_the_axes_that_the_dense_mesh_does_not_have():
    assert ParallelismSizes(tp_size=2).beyond_dense == {}
    assert ParallelismSizes(ep_size=4, extra={"ring": 1}).beyond_dense == {"ep": 4, "ring": 1}
