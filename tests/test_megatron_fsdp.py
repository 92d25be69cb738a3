"""Training with Megatron-FSDP, the real package, is training on one process."""

import pytest

from nemo_dist import MegatronFSDPConfig
from nemo_dist.testing.cuda_calls import WithCudaCalls
from nemo_dist.testing.equivalence import Task, assert_equivalent


@pytest.fixture
def ranks(ranks):
    """The pools of ranks, with a stand-in for the calls of torch.cuda that the package makes."""
    return lambda world_size: WithCudaCalls(ranks(world_size))


@pytest.mark.parametrize("specimen", ["llama", "llama-tied", "bert-sequences", "bert-tokens", "llava"])
@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("world", [2, 4])
def test_it_computes_what_one_process_computes(ranks, world, zero, specimen):
    assert_equivalent(ranks(world), Task(specimen=specimen), strategy=MegatronFSDPConfig(zero_dp_strategy=zero))


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_it_accumulates_what_one_process_computes(ranks, zero):
    assert_equivalent(ranks(2), Task(accumulate=3), strategy=MegatronFSDPConfig(zero_dp_strategy=zero))
