"""The setup that a refusal names instead is not refused itself."""

import re
from itertools import product

import pytest

from nemo_dist import DistributedSetup, ParallelismSizes, TopologyError

AXES = ("dp_replicate_size", "tp_size", "cp_size", "pp_size", "ep_size")
WIDE = [
    {axis: 2 for axis, wide in zip(AXES, choice, strict=True) if wide} for choice in product((False, True), repeat=5)
]
STRATEGIES = ("fsdp2", "ddp", "megatron_fsdp")


def problems(**asked):
    try:
        DistributedSetup.build(**asked)
    except TopologyError as error:
        return error.problems
    return ()


def named_strategies(problem):
    """Return the strategies that the refusal of a composition says to use, if nothing has to be left out too."""
    found = re.search(r"does not compose with it; use ([^,;]*)$", problem)
    return re.findall(r"'(\w+)'", found[1]) if found else []


@pytest.mark.parametrize("mode", [False, "full", "selective"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_that_is_named_instead_takes_all_that_was_asked(strategy, mode):
    seen = 0
    for sizes in WIDE:
        asked = {"parallelism_sizes": ParallelismSizes(**sizes), "activation_checkpointing": mode, "world_size": 32}
        for problem in problems(strategy=strategy, **asked):
            for other in named_strategies(problem):
                seen += 1
                assert problems(strategy=other, **asked) == (), (sizes, mode, problem)
    assert seen or strategy == "fsdp2"


def test_what_no_strategy_takes_together_is_said_to_be_left_out():
    (problem, *_) = problems(
        strategy="ddp",
        parallelism_sizes=ParallelismSizes(tp_size=2),
        activation_checkpointing="selective",
        world_size=8,
    )
    assert "use 'fsdp2'" in problem and "megatron_fsdp" not in problem


@pytest.mark.parametrize("world", range(1, 25))
@pytest.mark.parametrize("sizes", [{"tp_size": 4}, {"pp_size": 3, "cp_size": 2}, {"dp_size": 4, "tp_size": 2}])
def test_the_number_of_ranks_that_is_named_instead_fits(world, sizes):
    given = ParallelismSizes(**sizes)
    for problem in given.problems(world):
        for number in re.findall(r"start (\d+)(?: or (\d+))? ranks", problem):
            for ranks in filter(None, number):
                assert given.problems(int(ranks)) == []
        if found := re.search(r"leave dp_size out to get (\d+)", problem):
            assert ParallelismSizes(**{**sizes, "dp_size": None}).dp(world) == int(found[1])


@pytest.mark.parametrize("replicate", range(2, 25))
@pytest.mark.parametrize("axis", ["tp_size", "cp_size", "pp_size"])
def test_the_number_of_replicas_that_is_named_instead_fits(replicate, axis):
    for dp in (8, 12, 24):
        for problem in ParallelismSizes(dp_replicate_size=replicate).problems(dp):
            for numbers in re.findall(r"use (\d+)(?: or (\d+))?, or leave it out", problem):
                for number in filter(None, numbers):
                    assert ParallelismSizes(dp_replicate_size=int(number)).problems(dp) == []
        pure = ParallelismSizes(**{axis: 2}, dp_replicate_size=dp)
        assert pure.problems(2 * dp) == []


def test_pure_replicas_are_sent_to_a_strategy_that_takes_them():
    (problem,) = problems(parallelism_sizes=ParallelismSizes(dp_replicate_size=4), world_size=4)
    assert "leave it out, or use a strategy that only replicates" in problem
    assert problems(strategy="ddp", world_size=4) == ()
