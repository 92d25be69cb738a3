"""Expert parallelism computes what one process computes."""

import pytest

from nemo_dist import FSDP2Config, ParallelismSizes
from nemo_dist.testing.equivalence import Task, assert_equivalent

FP32 = {"param_dtype": "float32", "reduce_dtype": "float32", "output_dtype": "float32"}


def setup(recompute=False, moe=None, **sizes):
    return {
        "strategy": FSDP2Config(mp_policy=FP32),
        "parallelism_sizes": ParallelismSizes(**sizes),
        "activation_checkpointing": recompute,
        "moe_parallel_config": moe,
    }


@pytest.mark.parametrize("specimen", ["qwen3-moe", "mixtral", "qwen2-moe", "deepseek-v3"])
@pytest.mark.parametrize(("world", "sizes"), [(2, {"ep_size": 2}), (4, {"ep_size": 2}), (4, {"ep_size": 4})])
def test_experts_over_ranks_compute_what_one_process_computes(ranks, specimen, world, sizes):
    assert_equivalent(ranks(world), Task(specimen=specimen), **setup(**sizes))


@pytest.mark.parametrize(("world", "ep"), [(4, 2), (4, 4), (8, 2)])
@pytest.mark.parametrize("replicas", [2])
def test_experts_with_replicas_compute_what_one_process_computes(ranks, world, ep, replicas):
    """The parameters of all replicas are compared bit for bit, those of the experts included."""
    assert_equivalent(ranks(world), Task(specimen="qwen2-moe"), **setup(ep_size=ep, dp_replicate_size=replicas))
