"""The pictures in the docs show what ranks can do, in an order worked out by hand. As a script: draw them."""

import re
import sys
from itertools import pairwise
from pathlib import Path

import attrs
import pytest

from nemo_dist_pipeline import named
from nemo_dist_pipeline.runtime.torch_stage import torch_order
from nemo_dist_pipeline.schedule.visualize import picture

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
RANKS, MICROBATCHES = 4, 8
STAGES = {"1F1B": 4, "Interleaved1F1B": 8, "InterleavedZeroBubble": 8}  # stage s is on rank s modulo 4
DRAWN = re.compile(
    r'<rect x="(\d+)" y="(\d+)" width="(\d+)" height="26" rx="3"[^>]*/><text[^>]*>(\d*)([FBIW])(\d+)</text>'
)


@attrs.frozen
class Box:
    """Where an action is drawn: the row of its rank, and from where to where in time."""

    rank: int
    start: int
    end: int


def shown(name):
    """Return what the picture of schedule *name* shows: of every (stage, kind, microbatch) the box."""
    text = (PICTURES / f"{name.lower()}.svg").read_text()
    rows = [int(y) - 17 for y in re.findall(r'<text x="6" y="(\d+)"[^>]*>rank \d', text)]
    boxes = {}
    for x, y, width, stage, kind, microbatch in DRAWN.findall(text):
        rank, start = rows.index(int(y)), int(x)
        action = (int(stage or rank), kind, int(microbatch))
        assert action not in boxes, f"{action} is there twice"
        boxes[action] = Box(rank=rank, start=start, end=start + int(width))
    return boxes


def test_the_picture_of_1f1b_has_the_order_worked_out_by_hand():
    """A rank runs ahead by a forward for each rank after it, then alternates, then ends with what is left."""
    lines = [[], [], [], []]
    for (_, kind, microbatch), box in shown("1F1B").items():
        lines[box.rank].append((box.start, f"{kind}{microbatch}"))

    assert [" ".join(label for _, label in sorted(line)) for line in lines] == [
        "F0 F1 F2 F3 B0 F4 B1 F5 B2 F6 B3 F7 B4 B5 B6 B7",
        "F0 F1 F2 B0 F3 B1 F4 B2 F5 B3 F6 B4 F7 B5 B6 B7",
        "F0 F1 B0 F2 B1 F3 B2 F4 B3 F5 B4 F6 B5 F7 B6 B7",
        "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 F7 B7",
    ]


@pytest.mark.parametrize("name", STAGES)
def test_a_picture_shows_every_action_once_and_after_what_it_needs(name):
    boxes, last = shown(name), STAGES[name] - 1
    everything = [(stage, microbatch) for stage in range(last + 1) for microbatch in range(MICROBATCHES)]

    backward = "B" if name != "InterleavedZeroBubble" else "I"  # that one computes the gradients of weights apart
    kinds = ["F", "B"] if backward == "B" else ["F", "I", "W"]
    assert boxes.keys() == {(stage, kind, microbatch) for stage, microbatch in everything for kind in kinds}
    for stage, microbatch in everything:
        forward, back = boxes[stage, "F", microbatch], boxes[stage, backward, microbatch]
        assert {boxes[stage, kind, microbatch].rank for kind in kinds} == {stage % RANKS}
        assert back.start > forward.end
        if stage > 0:
            assert forward.start > boxes[stage - 1, "F", microbatch].end
        if stage < last:
            assert back.start > boxes[stage + 1, backward, microbatch].end
        if "W" in kinds:
            assert boxes[stage, "W", microbatch].start > back.end
    for rank in range(RANKS):
        line = sorted((box for box in boxes.values() if box.rank == rank), key=lambda box: box.start)
        assert all(after.start > before.end for before, after in pairwise(line)), "a rank does one thing at a time"


@pytest.mark.parametrize(
    ("name", "idle"), [("1F1B", 3 / 11), ("Interleaved1F1B", 3 / 19), ("InterleavedZeroBubble", 3 / 51)]
)
def test_a_picture_says_how_long_ranks_idle(name, idle):
    """The share is that of docs/pipeline.md, (p-1) / (m+p-1) and so on, for p = 4 ranks and m = 8 microbatches."""
    assert f">idle {idle:.1%}<" in (PICTURES / f"{name.lower()}.svg").read_text()


def draw(name):
    schedule = named(name)
    return picture(torch_order(schedule, RANKS, schedule.per_rank, MICROBATCHES), "svg")


if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    for wanted in STAGES:
        (PICTURES / f"{wanted.lower()}.svg").write_text(draw(wanted))
    sys.exit()
