"""ZeRO stage 1 passes the kit, shares the optimizer state, and resumes as if it had never stopped."""

import pytest
import torch

from nemo_dist import DistributedSetup, ParallelismSizes
from nemo_dist.testing import PluginConformance
from nemo_dist.testing.comm_recorder import assert_no_deadlock
from nemo_dist.testing.equivalence import Task, assert_equivalent, checkpoint
from nemo_dist.testing.resume import assert_resumes
from nemo_dist.testing.tensors import rows_of_rank
from nemo_dist.testing.tiny_models import SPECIMENS
from nemo_dist_zero1 import Zero1Config


class TestZero1(PluginConformance):
    plugin = "zero1"


def on_rank_state_of_the_optimizer(folder):
    setup = DistributedSetup.build(strategy=Zero1Config())
    runtime = setup.runtime(SPECIMENS["llama"].load.from_pretrained(folder, distributed_setup=setup))
    optimizer = runtime.optimizer(torch.optim.AdamW, lr=1e-3)
    runtime.forward_backward(rows_of_rank(Task().batches(0)[0], runtime))
    optimizer.step()
    kept = sum(state["exp_avg"].numel() for state in optimizer.state.values())
    return kept, sum(parameter.numel() for _, parameter in runtime.named_parameters())


def test_each_rank_keeps_half_of_the_moments(ranks):
    (first, whole), (second, _) = ranks(2).run(on_rank_state_of_the_optimizer, checkpoint("llama"))
    assert first + second == whole
    assert abs(first - second) < 0.1 * whole


def test_a_run_that_stops_twice_goes_on_as_if_it_had_not(ranks):
    assert_resumes(ranks(2), strategy="zero1")


def test_it_takes_over_the_checkpoint_of_another_strategy(ranks):
    assert_resumes(ranks(2), at=(2,), first={"strategy": "ddp"}, strategy="zero1")
    assert_resumes(ranks(2), at=(2,), first={"strategy": "zero1"}, strategy="ddp")


def test_it_trains_with_sequences_that_are_split(ranks):
    assert_equivalent(ranks(2), Task(), strategy="zero1", parallelism_sizes=ParallelismSizes(cp_size=2))


def test_no_rank_waits_for_ever_on_nccl(ranks):
    assert_no_deadlock(ranks(2), Task(), strategy="zero1")


def on_rank_step_with_a_closure(folder):
    setup = DistributedSetup.build(strategy="zero1")
    runtime = setup.runtime(SPECIMENS["llama"].load.from_pretrained(folder, distributed_setup=setup))
    optimizer = runtime.optimizer(torch.optim.SGD, lr=1e-3)
    with pytest.raises(ValueError, match="zero1 cannot run a closure"):
        optimizer.step(lambda: None)


def test_a_closure_is_refused(ranks):
    ranks(2).run(on_rank_step_with_a_closure, checkpoint("llama"))
