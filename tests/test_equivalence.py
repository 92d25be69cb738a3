"""Training under a strategy is training on one process: loss, every gradient, clipped norm, three AdamW steps."""

import pytest
import torch
from cases import cases, crossed, slow
from setups import DATA_PARALLEL

from nemo_dist import DDPConfig, FSDP2Config, ParallelismSizes
from nemo_dist.testing.equivalence import Outcome, Task, assert_equivalent, differences
from nemo_dist.testing.precision import FP32

SPECIMENS = ["llama", "llama-tied", "bert-sequences", "bert-tokens", "llava"]
DATA_PARALLEL_WORLDS = [("fsdp2", 2), ("fsdp2", 4), ("hsdp", 4), ("ddp", 2), ("ddp", 4)]


@cases(("specimen", "strategy", "world"), crossed(SPECIMENS, DATA_PARALLEL_WORLDS))
def test_a_strategy_matches_one_process(ranks, specimen, strategy, world):
    assert_equivalent(ranks(world), Task(specimen=specimen), **DATA_PARALLEL[strategy])


@cases(
    ("world", "options", "sizes"),
    [
        (2, {}, {}),
        slow(4, {}, {"dp_replicate_size": 2}),
        slow(2, {}, {"cp_size": 2}),
        slow(4, {}, {"tp_size": 2}),
        slow(4, {}, {"pp_size": 2}),
        slow(2, {"offload_policy": "cpu"}, {}),
        slow(2, {"reshard_after_forward": False}, {}),
    ],
)
def test_a_tied_weight_whose_rows_do_not_divide_the_ranks_matches_one_process(ranks, world, options, sizes):
    config = FSDP2Config(mp_policy=FP32, **options)
    assert_equivalent(
        ranks(world), Task(specimen="llama-odd-tied"), strategy=config, parallelism_sizes=ParallelismSizes(**sizes)
    )


@cases(("strategy", "world"), [("fsdp2", 2), ("hsdp", 4), ("ddp", 2)])
@pytest.mark.parametrize("specimen", ["llama-tied", "bert-tokens"])
def test_accumulated_batches_weigh_by_their_labels(ranks, specimen, strategy, world):
    assert_equivalent(ranks(world), Task(specimen=specimen, accumulate=3), **DATA_PARALLEL[strategy])


@pytest.mark.parametrize(
    "option",
    [
        {"reshard_after_forward": False},
        {"reshard_after_forward": True},
        {"reshard_after_forward": 2},
        {"forward_prefetch_depth": 3, "backward_prefetch_depth": 2},
        {"defer_fsdp_grad_sync": False},
    ],
    ids=str,
)
def test_an_option_of_fsdp2_does_not_change_the_numbers(ranks, option):
    config = FSDP2Config(mp_policy=FP32, **option)
    assert_equivalent(ranks(4), Task(specimen="llama-tied", accumulate=2), strategy=config)


@pytest.mark.parametrize(
    "option",
    [{"bucket_cap_mb": 1}, {"gradient_as_bucket_view": True}, {"find_unused_parameters": True}, {"static_graph": True}],
    ids=str,
)
def test_an_option_of_ddp_does_not_change_the_numbers(ranks, option):
    assert_equivalent(ranks(2), Task(specimen="llama-tied", accumulate=2), strategy=DDPConfig(**option))


def test_rows_that_do_not_divide_the_ranks_weigh_by_their_labels(ranks):
    assert_equivalent(ranks(4), Task(specimen="llama", rows=7), **DATA_PARALLEL["fsdp2"])


@pytest.mark.parametrize("rounded", [float("nan"), float("inf"), 2.0])
def test_a_rounding_that_tells_nothing_explains_no_difference(rounded):
    def outcome(loss, gradient):
        return Outcome(losses=[loss], norms=[1.0], gradients={"w": torch.full((2,), gradient)}, parameters={})

    found = differences(outcome(3.0, 3.0), outcome(1.0, 1.0), other=outcome(rounded, rounded))
    assert [line.partition(":")[0] for line in found] == ["losses[0]", "gradients"]
