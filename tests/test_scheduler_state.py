"""A schedule goes on where a topology splits the groups of the optimizer otherwise, as two device meshes do."""

import functools
import json
import math

import pytest
import torch
import transformers
from torch.optim import lr_scheduler

from nemo_dist import CheckpointError
from nemo_dist.checkpoint.json_state import from_json, to_json
from nemo_dist.checkpoint.optimizer_state import GROUP
from nemo_dist.checkpoint.scheduler_state import fitted, restore_scheduler, scheduler_state


def half_cosine(step, length):
    return 0.5 + 0.5 * math.cos(step / length)


class Factor:
    """A factor that is an object, whose value is saved."""

    def __init__(self, value):
        self.value = value

    def __call__(self, step):
        return self.value


SCHEDULES = {
    "transformers": lambda optimizer, of: transformers.get_cosine_schedule_with_warmup(optimizer, 2, 9),
    "partial": lambda optimizer, of: lr_scheduler.LambdaLR(optimizer, functools.partial(half_cosine, length=9)),
    "factors": lambda optimizer, of: lr_scheduler.MultiplicativeLR(
        optimizer, of(lambda index: Factor(0.9 - index / 10))
    ),
    "sequence": lambda optimizer, of: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer), lr_scheduler.LambdaLR(optimizer, functools.partial(half_cosine, length=9))],
        milestones=[2],
    ),
    "plateau": lambda optimizer, of: lr_scheduler.ReduceLROnPlateau(
        optimizer, patience=0, min_lr=of(lambda index: 1e-5 * (index + 1))
    ),
    "greedy": lambda optimizer, of: transformers.get_scheduler("greedy", optimizer),
    "cycle": lambda optimizer, of: lr_scheduler.CyclicLR(
        optimizer, 1e-3, of(lambda index: 2e-3 * (index + 1)), 3, cycle_momentum=False
    ),
}


def made(kind, indices, rate=1e-3):
    """Return an optimizer whose groups belong to those that the user gave with *indices*, and a schedule of it."""
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], GROUP: index} for index in indices]
    optimizer = torch.optim.AdamW(groups, lr=rate)
    return optimizer, SCHEDULES[kind](optimizer, lambda of_index: of_values(of_index, indices))


def of_values(of_index, indices):
    values = {index: of_index(index) for index in indices}
    return [values[index] for index in indices]


def stepped(optimizer, scheduler, count):
    """Return the rate of each group that the user gave after each of *count* steps."""
    rates = []
    for _ in range(count):
        optimizer.step()
        scheduler.step(*([1.0] if hasattr(scheduler, "best") else []))
        rates.append({group[GROUP]: group["lr"] for group in optimizer.param_groups})
    return rates


def as_saved(scheduler):
    return json.loads(json.dumps(to_json(scheduler_state(scheduler))))


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize(
    ("there", "here"),
    [([0], [0, 0]), ([0, 0], [0]), ([0, 1], [0, 0, 1]), ([0, 0, 1, 1], [0, 1]), ([0, 0, 1], [0, 1, 1])],
    ids=str,
)
def test_a_schedule_goes_on_in_groups_that_are_split_otherwise(kind, there, here):
    saved, scheduler = made(kind, there)
    stepped(saved, scheduler, 4)
    state = as_saved(scheduler)
    other, again = made(kind, here, rate=5.0)
    stepped(other, again, 1)
    for group in other.param_groups:  # as a load does
        first = next(one for one in saved.param_groups if one[GROUP] == group[GROUP])
        group.update({name: value for name, value in first.items() if name not in ("params", GROUP)})
    restore_scheduler(again, fitted(again, from_json(state)))
    assert as_saved(again) == state, "ranks with other groups say the same of it"
    assert stepped(other, again, 4) == stepped(saved, scheduler, 4)


@pytest.mark.parametrize("kind", ["plateau", "cycle"])
def test_values_of_two_given_groups_do_not_load_into_one(kind):
    state = scheduler_state(made(kind, [0, 1, 1])[1])
    again = made(kind, [0])[1]
    with pytest.raises(
        CheckpointError, match=r"was saved with m\w+ \[.*\] for 2 groups of the optimizer, and here are 1"
    ):
        fitted(again, state)


@pytest.mark.parametrize(("there", "here"), [("plateau", "partial"), ("partial", "cycle"), ("factors", "sequence")])
def test_a_schedule_of_another_kind_is_refused(there, here):
    state = scheduler_state(made(there, [0])[1])
    with pytest.raises(CheckpointError, match="was saved with another schedule"):
        fitted(made(here, [0])[1], state)
