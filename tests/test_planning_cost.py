"""What planning costs a rank is measured by planning; what it sends and writes does not grow with tensors or ranks."""

import pytest

from nemo_dist import MeshPlan, ParallelismSizes
from nemo_dist.checkpoint.planning_cost import Placed, held_of, planning_cost


def stage(first, count):
    """Return weights and moments of layers, under FSDP2 over tensor parallelism."""
    placements = {"dp_shard": (0, 2), "tp": (0,)}
    return {
        f"{kind}/layers.{index}.weight": Placed((512, 64), "float32", placements)
        for kind in ("model", "optimizer.exp_avg")
        for index in range(first, first + count)
    }


def cost(world, stages, rank=0, **sizes):
    return planning_cost(MeshPlan.resolve(ParallelismSizes(tp_size=2, **sizes), world), stages, rank)


def test_ranks_of_one_stage_exchange_a_digest_whatever_they_hold():
    few, many = (cost(64, [stage(0, count)], 5) for count in (2, 200))
    assert few.exchanged_bytes == pytest.approx(many.exchanged_bytes, abs=8) and many.exchanged_bytes < 200


def test_what_differs_between_stages_is_sent_once_for_each():
    stages = [stage(0, 10), stage(10, 10)]
    few, many = (cost(world, stages, world - 1, pp_size=2) for world in (16, 256))
    assert 1000 < few.exchanged_bytes == pytest.approx(many.exchanged_bytes, abs=20)


def test_the_manifest_grows_with_the_ranks_by_a_line_each():
    small, large, larger = (cost(world, [stage(0, 20)]).manifest_bytes for world in (16, 64, 256))
    assert large - small == pytest.approx((larger - large) / 4, rel=0.1) and (large - small) / 48 < 100


def test_axes_of_one_rank_cut_nothing():
    (tensor,) = held_of(MeshPlan.resolve(ParallelismSizes(), 1), {"w": Placed((4,), "int8", {"tp": (0,)})}).values()
    assert tensor.layout.cuts == ()


def test_stages_that_the_plan_does_not_have_are_refused():
    with pytest.raises(ValueError, match="those of the 2 that the plan has"):
        cost(8, [stage(0, 1)], pp_size=2)
