"""Ranks compute what one rank with the same rounding computes; the rounding does what it says."""

import pytest
import torch

from nemo_dist import DistributedSetup, FSDP2Config, ParallelismSizes, TopologyError
from nemo_dist.testing import PluginConformance
from nemo_dist.testing.equivalence import Task, differences, trained
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.resume import assert_resumes
from nemo_dist_fake_quant import FakeQuant, FakeQuantConfig

BUILD = {"strategy": FSDP2Config(mp_policy=FP32), "plugins": ("fake_quant",)}
# A last bit may round an input to its neighbour, one in 127 of its token, and AdamW takes full steps on that.
BOUND = 1e-2


class TestFakeQuant(PluginConformance):
    plugin = "fake_quant"
    build = BUILD

    def test_it_computes_what_one_process_computes(self, ranks):
        self.assert_like_one_rank(ranks, Task())

    def test_it_accumulates_what_one_process_computes(self, ranks):
        self.assert_like_one_rank(ranks, Task(accumulate=3))

    def assert_like_one_rank(self, ranks, task):
        """The kit compares with plain transformers; this plugin is compared with itself on one rank."""
        alone = trained(ranks(1), task, **BUILD)
        assert differences(trained(ranks(2), task, **BUILD), alone, BOUND) == []
        plain = trained(ranks(1), task, strategy=FSDP2Config(mp_policy=FP32))
        assert differences(alone, plain, 1e-3) != []  # it does something


def test_a_run_that_stops_twice_goes_on_as_if_it_had_not(ranks):
    assert_resumes(ranks(2), **BUILD)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_inputs_take_as_many_values_as_the_bits_have(bits):
    inputs = torch.linspace(-1, 1, 5000, requires_grad=True)[None]
    inputs.retain_grad()
    rounded = FakeQuant(FakeQuantConfig(bits=bits)).rounded(lambda given: given, inputs)
    rounded.sum().backward()
    assert len(rounded.detach().unique()) == 2**bits - 1
    assert torch.equal(inputs.grad, torch.ones_like(inputs))


def test_what_would_not_be_exact_is_refused():
    with pytest.raises(TopologyError, match="fake_quant takes one scale per token"):
        DistributedSetup.build(parallelism_sizes=ParallelismSizes(tp_size=2), plugins=("fake_quant",), world_size=2)
    with pytest.raises(ValueError, match="bits must be an int from 2 up"):
        FakeQuantConfig(bits=1)
