"""What the pipeline takes from the inside of torch's pipelining is there, and is what it is taken for."""

import inspect
import re

import pytest
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining import schedules as torch_schedules
from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

from nemo_dist_pipeline import SCHEDULES
from nemo_dist_pipeline.runtime.torch_stage import ModelStage
from nemo_dist_pipeline.schedule.actions import order_of


def test_our_names_of_schedules_are_torchs():
    for name, schedule in SCHEDULES.items():
        made = torch_schedules.get_schedule_class(name)
        single = issubclass(made, torch_schedules.PipelineScheduleSingle)
        assert single == (schedule.fixed and schedule.per_rank == 1)


@pytest.mark.parametrize("name", ["forward_maybe_with_nosync", "_post_metadata_inference_cleanup"])
def test_a_stage_overrides_a_method_that_torch_calls(name):
    ours, theirs = (inspect.signature(getattr(kind, name)).parameters for kind in (ModelStage, PipelineStage))
    assert name in vars(ModelStage)
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]
    sources = [inspect.getsource(module) for module in (inspect.getmodule(PipelineStage), torch_schedules)]
    assert any(re.search(rf"\b(self|stage)\.{name}\(", source) for source in sources)


@pytest.mark.parametrize("text", ["0F0,0B0", "0F0,,0I0,0W0"])
def test_torch_reads_a_line_of_a_schedule_as_we_do(text):
    cells = text.split(",")
    theirs = [torch_schedules._Action.from_str(cell) for cell in cells]
    assert order_of([theirs]) == order_of([cells])


def test_torch_makes_an_order_without_a_process_group():
    order = order_of(get_schedule_ops("Interleaved1F1B", 2, 4, 2))
    assert len(order) == 2 and all(len(line) == 16 for line in order)
