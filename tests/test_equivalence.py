"""Training under a strategy is training on one process: loss, every gradient, clipped norm, three AdamW steps."""

import pytest

from nemo_dist import DDPConfig, FSDP2Config, ParallelismSizes
from nemo_dist.testing.equivalence import Task, assert_equivalent

FP32 = {"param_dtype": "float32", "reduce_dtype": "float32", "output_dtype": "float32"}
SETUPS = {
    "fsdp2": {"strategy": FSDP2Config(mp_policy=FP32)},
    "hsdp": {"strategy": FSDP2Config(mp_policy=FP32), "parallelism_sizes": ParallelismSizes(dp_replicate_size=2)},
    "ddp": {"strategy": DDPConfig()},
}
SPECIMENS = ["llama", "llama-tied", "bert-sequences", "bert-tokens", "llava"]


@pytest.mark.parametrize("specimen", SPECIMENS)
@pytest.mark.parametrize(("strategy", "world"), [("fsdp2", 2), ("fsdp2", 4), ("hsdp", 4), ("ddp", 2), ("ddp", 4)])
def test_a_strategy_matches_one_process(ranks, specimen, strategy, world):
    assert_equivalent(ranks(world), Task(specimen=specimen), **SETUPS[strategy])


@pytest.mark.parametrize(("strategy", "world"), [("fsdp2", 2), ("hsdp", 4), ("ddp", 2)])
@pytest.mark.parametrize("specimen", ["llama-tied", "bert-tokens"])
def test_accumulated_batches_weigh_by_their_labels(ranks, specimen, strategy, world):
    assert_equivalent(ranks(world), Task(specimen=specimen, accumulate=3), **SETUPS[strategy])


@pytest.mark.parametrize(
    "option",
    [
        {"reshard_after_forward": False},
        {"reshard_after_forward": True},
        {"reshard_after_forward": 2},
        {"forward_prefetch_depth": 3, "backward_prefetch_depth": 2},
        {"defer_fsdp_grad_sync": False},
    ],
)
def test_an_option_of_fsdp2_does_not_change_the_numbers(ranks, option):
    config = FSDP2Config(mp_policy=FP32, **option)
    assert_equivalent(ranks(4), Task(specimen="llama-tied", accumulate=2), strategy=config)


@pytest.mark.parametrize(
    "option",
    [{"bucket_cap_mb": 1}, {"gradient_as_bucket_view": True}, {"find_unused_parameters": True}, {"static_graph": True}],
)
def test_an_option_of_ddp_does_not_change_the_numbers(ranks, option):
    assert_equivalent(ranks(2), Task(specimen="llama-tied", accumulate=2), strategy=DDPConfig(**option))


def test_rows_that_do_not_divide_the_ranks_weigh_by_their_labels(ranks):
    assert_equivalent(ranks(4), Task(specimen="llama", rows=7), **SETUPS["fsdp2"])
