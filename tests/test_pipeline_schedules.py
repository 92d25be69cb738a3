"""Schedules, stages and files on paper: no torch but where ours is held against it."""

import pkgutil
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

import nemo_dist_pipeline.schedule
from nemo_dist import PipelineConfig
from nemo_dist_pipeline import SCHEDULES, named, stage_ids_this_rank, virtual_stages
from nemo_dist_pipeline.partition.balance import balanced
from nemo_dist_pipeline.schedule.actions import Action, order_of, parse, problems_of
from nemo_dist_pipeline.schedule.simulation import simulate
from nemo_dist_pipeline.schedule.visualize import picture


@pytest.mark.parametrize(
    ("spelled", "name"),
    [
        ("1f1b", "1F1B"),
        ("GPIPE", "GPipe"),
        ("interleaved_1f1b", "Interleaved1F1B"),
        ("Interleaved1F1B", "Interleaved1F1B"),
        ("zero_bubble", "InterleavedZeroBubble"),
        ("interleaved-zero-bubble", "InterleavedZeroBubble"),
        ("zbv", "ZBVZeroBubble"),
        ("zbv_zero_bubble", "ZBVZeroBubble"),
        ("looped_bfs", "LoopedBFS"),
        ("dualpipev", "DualPipeV"),
        ("dual_pipe_v", "DualPipeV"),
    ],
)
def test_a_schedule_is_known_however_it_is_spelled(spelled, name):
    assert named(spelled).name == name


def test_an_unknown_schedule_is_refused_with_the_near_match():
    with pytest.raises(ValueError, match=r"unknown pp_schedule 'interleave1f1b'; did you mean 'Interleaved1F1B'\?"):
        PipelineConfig(pp_schedule="interleave1f1b")
    with pytest.raises(ValueError, match="valid names: GPipe, 1F1B, LoopedBFS"):
        PipelineConfig(pp_schedule="wavefront")


@given(pp=st.integers(1, 16), per_rank=st.integers(1, 4))
def test_stages_are_dealt_to_one_rank_each(pp, per_rank):
    dealt = [stage for rank in range(pp) for stage in stage_ids_this_rank(rank, pp, pp * per_rank)]
    folded = [stage for rank in range(pp) for stage in stage_ids_this_rank(rank, pp, pp * 2, "v")]

    assert sorted(dealt) == list(range(pp * per_rank))
    assert sorted(folded) == list(range(pp * 2))


def test_a_v_placement_goes_down_the_ranks_and_back():
    assert [stage_ids_this_rank(rank, 4, 8, "v") for rank in range(4)] == [(0, 7), (1, 6), (2, 5), (3, 4)]
    assert [stage_ids_this_rank(rank, 4, 8) for rank in range(4)] == [(0, 4), (1, 5), (2, 6), (3, 7)]


def test_stages_that_cannot_be_dealt_are_refused():
    with pytest.raises(ValueError, match="6 stages cannot be dealt evenly to 4"):
        stage_ids_this_rank(0, 4, 6)
    with pytest.raises(ValueError, match="a V schedule has 2 stages on each of 4 ranks"):
        stage_ids_this_rank(0, 4, 4, "v")


def test_virtual_stages_follow_layers_per_stage_and_its_rounding():
    looped, single = SCHEDULES["Interleaved1F1B"], SCHEDULES["1F1B"]

    assert virtual_stages(9, None, 4, looped) == 8 and virtual_stages(9, None, 4, single) == 4
    assert virtual_stages(16, 2, 4, looped) == 8
    assert virtual_stages(9, 2, 4, looped, "up") == 8 and virtual_stages(9, 2, 4, looped, "down") == 4
    with pytest.raises(ValueError, match="makes 5 stages of 9 layers, which is no multiple of the 4 pipeline ranks"):
        virtual_stages(9, 2, 4, looped)
    with pytest.raises(ValueError, match="schedule '1F1B' takes exactly 1 stages on a rank"):
        virtual_stages(16, 2, 4, single)
    with pytest.raises(ValueError, match="makes fewer stages than 4 ranks"):
        virtual_stages(9, 4, 4, looped, "down")


def brute_force(costs, stages, first, last):
    """The least maximal cost over every division."""
    if stages == 1:
        return sum(costs) + first + last
    heads = range(1, len(costs) - stages + 2)
    return min(max(sum(costs[:n]) + first, brute_force(costs[n:], stages - 1, 0, last)) for n in heads)


@given(
    costs=st.lists(st.integers(1, 9), min_size=1, max_size=7),
    stages=st.integers(1, 4),
    first=st.integers(0, 12),
    last=st.integers(0, 12),
)
def test_balancing_minimises_the_cost_of_the_largest_stage(costs, stages, first, last):
    stages = min(stages, len(costs))
    sizes = balanced(costs, stages, first, last)
    ends = [sum(sizes[: index + 1]) for index in range(stages)]
    found = [sum(costs[end - size : end]) for end, size in zip(ends, sizes, strict=True)]
    found[0] += first
    found[-1] += last

    assert sum(sizes) == len(costs) and min(sizes) >= 1
    assert max(found) == brute_force(costs, stages, first, last)


@given(layers=st.integers(1, 40), stages=st.integers(1, 12))
def test_equal_layers_are_dealt_evenly(layers, stages):
    if layers < stages:
        with pytest.raises(ValueError, match=f"{layers} layers cannot make {stages} stages"):
            balanced([1.0] * layers, stages)
        return
    sizes = balanced([1.0] * layers, stages)
    assert max(sizes) - min(sizes) <= 1


def orders():
    """Every schedule of torch's on 2 to 5 ranks with several numbers of microbatches that it takes."""
    from nemo_dist_pipeline.runtime.torch_stage import torch_order

    for schedule in SCHEDULES.values():
        for pp in (2, 3, 4, 5):
            for count in (2 * pp - 1, 2 * pp, 4 * pp):
                if schedule.microbatch_problem(pp, count) is None:
                    yield schedule, pp, count, torch_order(schedule, pp, schedule.per_rank, count)


def test_every_torch_order_is_complete_and_runs_through():
    for schedule, pp, count, order in orders():
        assert problems_of(order) == [], (schedule.name, pp, count)
        assert not simulate(order).stuck


def test_the_theoretical_bubble_is_that_of_torchs_orders():
    for schedule, pp, count, order in orders():
        simulated = simulate(order).bubble
        assert schedule.bubble(pp, schedule.per_rank, count) == pytest.approx(simulated), (schedule.name, pp)


@pytest.mark.slow
def test_the_microbatch_rules_are_torchs():
    from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

    for schedule in SCHEDULES.values():
        for pp in (2, 3, 4):
            for count in range(1, 10):
                try:
                    get_schedule_ops(schedule.name, pp, count, schedule.per_rank)
                    refused = False
                except ValueError:
                    refused = True
                assert refused == (schedule.microbatch_problem(pp, count) is not None), (schedule.name, pp, count)


def test_actions_read_as_torch_prints_them():
    assert parse(" 12F3 ") == (Action(12, "F", 3),)
    assert parse("(1F4;2B1)OVERLAP_F_B") == (Action(1, "F", 4), Action(2, "B", 1))
    assert parse("") == () and parse("1SEND_F0") == ()
    assert order_of([["0F0", None, "0B0"]]) == ((Action(0, "F", 0), Action(0, "B", 0)),)
    with pytest.raises(ValueError, match=r"'F1' is no action; write a stage, one of F, B, I or W"):
        parse("F1")


def test_a_deadlock_says_where_ranks_wait():
    stuck = simulate(order_of([["0F0", "0B0"], ["1F1", "1F0", "1B0"]])).stuck
    assert stuck == {0: Action(0, "B", 0), 1: Action(1, "F", 1)}


def test_a_text_picture_shows_when_every_rank_does_what():
    order = order_of([["0F0", "0F1", "0B0", "0B1"], ["1F0", "1B0", "1F1", "1B1"]])

    assert picture(order).splitlines() == [
        "rank 0  F0 F1 .  .  B0 -- .  B1 --",
        "rank 1  .  F0 B0 -- F1 B1 -- .  .",
        "idle 33.3%",
    ]


def test_an_svg_picture_has_a_box_per_action():
    order = order_of([["0F0", "0B0"], ["1F0", "1I0", "1W0"]])
    drawn = picture(order, "svg")

    assert drawn.startswith("<svg ") and all(f">{label}<" in drawn for label in ("F0", "B0", "I0", "W0"))
    with pytest.raises(ValueError, match="form must be 'text' or 'svg'"):
        picture(order, "png")


def test_the_schedule_package_imports_no_torch():
    found = pkgutil.iter_modules(nemo_dist_pipeline.schedule.__path__, "nemo_dist_pipeline.schedule.")
    names = ", ".join(module.name for module in found)
    code = f"import sys, {names}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_planning_and_explaining_a_pipeline_import_no_torch():
    code = (
        "import sys; from nemo_dist import DistributedSetup, ParallelismSizes, PipelineConfig; "
        "text = DistributedSetup.build(world_size=64, parallelism_sizes=ParallelismSizes(pp_size=8),"
        " pipeline_config=PipelineConfig(pp_schedule='zbv', pp_batch_size=32)).explain(); "
        "sys.exit(1 if 'torch' in sys.modules else 'ok' if 'ranks idle 3.5%' in text else text)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.stderr.strip() == "ok"
