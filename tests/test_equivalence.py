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
def test_a_strategy_computes_what_one_process_computes(ranks, specimen, strategy, world):
    assert_equivalent(ranks(world), Task(specimen=specimen), **SETUPS[strategy])
