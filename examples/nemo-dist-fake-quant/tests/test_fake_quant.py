"""Ranks compute what one rank with the same rounding computes; the rounding does what it says."""

import pytest
import torch

from nemo_dist import DistributedSetup, FSDP2Config, ParallelismSizes, TopologyError
from nemo_dist.testing import PluginConformance
from nemo_dist.testing.resume import assert_resumes
from nemo_dist_fake_quant import FakeQuant, FakeQuantConfig

FP32, FP64 = (
    FSDP2Config(mp_policy={"param_dtype": dtype, "reduce_dtype": dtype, "output_dtype": dtype})
    for dtype in ("float32", "float64")
)


class TestFakeQuant(PluginConformance):
    """Compares with one rank that rounds, as it is not to compute what plain transformers compute.

    In float32 with 8 bits, sums in another order put some inputs on the other side of a bound between two values; they
    jump by one in 127, and what follows with them. That is no fault, and would need a loose bound that hides faults. In
    float64 with 4 bits no input of the task lies that near to a bound, so the kit's own bound of 1e-5 holds.
    """

    plugin = "fake_quant"
    build = {"strategy": FP64, "plugins": (FakeQuantConfig(bits=4),)}
    alone = True

    def task(self, **more):
        return super().task(dtype="float64", **more)


def test_a_run_that_stops_twice_goes_on_as_if_it_had_not(ranks):
    assert_resumes(ranks(2), strategy=FP32, plugins=("fake_quant",))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_inputs_take_as_many_values_as_the_bits_have(bits):
    inputs = torch.linspace(-1, 1, 5000, requires_grad=True)[None]
    inputs.retain_grad()
    rounded = FakeQuant(FakeQuantConfig(bits=bits)).rounded(lambda given: given, inputs)
    rounded.sum().backward()
    assert len(rounded.detach().unique()) == 2**bits - 1
    assert torch.equal(inputs.grad, torch.ones_like(inputs))


def test_what_would_not_be_exact_is_refused():
    sizes = ParallelismSizes(tp_size=2, ep_size=2)
    with pytest.raises(TopologyError, match=r"(?s)takes one scale per token.*not proven with ep_size 2"):
        DistributedSetup.build(parallelism_sizes=sizes, plugins=("fake_quant",), world_size=2)
    with pytest.raises(ValueError, match="bits must be an int from 2 up"):
        FakeQuantConfig(bits=1)
