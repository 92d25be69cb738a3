"""The pictures in the docs are those of the schedules; this script draws them anew."""

import sys
from pathlib import Path

import pytest

from nemo_dist_pipeline import named
from nemo_dist_pipeline.runtime.torch_stage import torch_order
from nemo_dist_pipeline.schedule.visualize import picture

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
NAMES = ["1F1B", "Interleaved1F1B", "InterleavedZeroBubble"]


def drawn(name):
    schedule = named(name)
    return picture(torch_order(schedule, 4, schedule.per_rank, 8), "svg")


@pytest.mark.parametrize("name", NAMES)
def test_the_docs_show_the_schedule_as_it_runs(name):
    assert (PICTURES / f"{name.lower()}.svg").read_text() == drawn(name)


if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    for wanted in NAMES:
        (PICTURES / f"{wanted.lower()}.svg").write_text(drawn(wanted))
    sys.exit()
