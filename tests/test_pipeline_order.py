"""No order of sends and receives of a pipeline can deadlock, not even if nothing is buffered."""

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from nemo_dist.testing.comm_playback import Message, Post, Wait, problems_either_way
from nemo_dist_pipeline import SCHEDULES
from nemo_dist_pipeline.partition.stage_model import StageInfo
from nemo_dist_pipeline.runtime import forward_only as module
from nemo_dist_pipeline.runtime.microbatches import Microbatches
from nemo_dist_pipeline.schedule.forward_order import forward_order
from nemo_dist_pipeline.schedule.stage_placement import StagePlacement


class Line:
    """What one rank of a pipeline sends, receives and waits for, recorded instead of done."""

    def __init__(self, rank, size):
        self.rank, self.members, self.events = rank, tuple(range(size)), []

    def isend(self, tensor, group_dst, group):
        return self.post(self.rank, group_dst, tensor)

    def irecv(self, tensor, group_src, group):
        return self.post(group_src, self.rank, tensor)

    def post(self, source, target, tensor):
        number, line = len(self.events), self
        message = Message(source=source, target=target, size=tensor.nbytes)
        self.events.append(Post(number=number, group="pp", members=self.members, batched=False, messages=(message,)))

        class Handle:
            def wait(self):
                line.events.append(Wait(number))

        return Handle()


def run_forward_only(placement, stages, rank, microbatches):
    """Run the real ``forward_only`` of *rank*, on stages that add one; return its events and outputs."""
    line = Line(rank, placement.pp_size)
    infos = [
        StageInfo(index=index, division=((),) * stages, blocks=(), hidden=())
        for index in placement.stage_ids(rank, stages)
    ]
    inputs = {"input_ids": torch.arange(microbatches)[:, None]}
    run = Microbatches(inputs, torch.ones(microbatches), microbatches, microbatches)

    def run_part(part, stage, hidden, given, loss):
        assert (hidden is None) == stage.is_first
        return torch.zeros(3) if hidden is None else hidden

    with (
        patch.multiple(dist, isend=line.isend, irecv=line.irecv),
        patch.object(module, "run_part", run_part),
    ):
        outputs = module.forward_only([None] * len(infos), infos, run, torch.empty(3), placement, None, None)
    assert len(outputs) == (microbatches if infos[-1].is_last else 0)
    return line.events


@pytest.mark.parametrize("pp", [2, 3, 4])
@pytest.mark.parametrize("name", SCHEDULES)
def test_an_evaluation_cannot_deadlock_under_any_schedule(name, pp):
    schedule = SCHEDULES[name]
    placement = StagePlacement(pp_size=pp, schedule=schedule)
    for per_rank in (schedule.per_rank,) if schedule.fixed else (1, 2, 3):
        for microbatches in (1, 2, 3, 4, 8, 9):
            lines = [run_forward_only(placement, pp * per_rank, rank, microbatches) for rank in range(pp)]
            assert problems_either_way(lines) == [], (per_rank, microbatches)


@given(owners=st.lists(st.integers(0, 4), min_size=1, max_size=9).map(tuple), microbatches=st.integers(1, 9))
def test_forwards_are_ordered_for_any_place_of_stages(owners, microbatches):
    order = forward_order(owners, microbatches)
    place = {(action.stage, action.microbatch): index for index, action in enumerate(order)}

    assert len(order) == len(place) == len(owners) * microbatches
    for (stage, microbatch), index in place.items():
        assert stage == 0 or place[stage - 1, microbatch] < index
    for stage in range(len(owners)):
        assert [action.microbatch for action in order if action.stage == stage] == list(range(microbatches))
