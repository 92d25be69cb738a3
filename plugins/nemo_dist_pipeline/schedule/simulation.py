"""Simulate a schedule: when every action runs, and how long the ranks wait; no torch.

A forward takes one unit of time, a backward for the inputs one, for the weights one, a whole backward two, and
communication none; so the idle share is the theoretical bubble of the order for equal stages.
"""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from nemo_dist_pipeline.schedule.actions import Action, Order

COST: Mapping[str, int] = {"F": 1, "I": 1, "W": 1, "B": 2}


@attrs.frozen
class Slot:
    """An action and when it runs, in units of time."""

    action: Action
    start: int
    end: int


@attrs.frozen
class Timeline:
    """For every rank its slots in order; ``stuck`` has, by rank, the action at which it waits for ever (a deadlock)."""

    ranks: tuple[tuple[Slot, ...], ...]
    stuck: Mapping[int, Action] = attrs.field(factory=dict)

    @property
    def length(self) -> int:
        """The time from the first start to the last end."""
        return max((slots[-1].end for slots in self.ranks if slots), default=0)

    @property
    def bubble(self) -> float:
        """The share of the ranks' time that is idle, from 0 to 1."""
        busy = sum(slot.end - slot.start for slots in self.ranks for slot in slots)
        return 1 - busy / (len(self.ranks) * self.length) if self.length else 0.0


def simulate(order: Order) -> Timeline:
    """Return the timeline of *order*: every rank runs the next action of its line as soon as its inputs are ready."""
    stages = 1 + max((action.stage for line in order for action in line), default=0)
    done: dict[tuple[int, str, int], int] = {}
    slots: list[list[Slot]] = [[] for _ in order]
    moving = True
    while moving:
        moving = False
        for line, finished in zip(order, slots, strict=True):
            while len(finished) < len(line):
                action = line[len(finished)]
                ready = _ready(action, done, stages)
                if ready is None:
                    break
                start = max(ready, finished[-1].end if finished else 0)
                finished.append(Slot(action, start, start + COST[action.kind]))
                done[action.stage, _effect(action), action.microbatch] = finished[-1].end
                moving = True
    stuck = {
        rank: line[len(finished)]
        for rank, (line, finished) in enumerate(zip(order, slots, strict=True))
        if len(finished) < len(line)
    }
    return Timeline(tuple(map(tuple, slots)), stuck)


def _effect(action: Action) -> str:
    """Return what others wait for: activations (F), gradients of the inputs (B or I), of the weights (W)."""
    return "I" if action.kind == "B" else action.kind


def _ready(action: Action, done: Mapping[tuple[int, str, int], int], stages: int) -> int | None:
    """Return when the inputs of *action* are ready, or None while they are not."""
    stage, microbatch = action.stage, action.microbatch
    needed: list[tuple[int, str, int]] = []
    if action.kind == "F" and stage > 0:
        needed.append((stage - 1, "F", microbatch))
    if action.kind in "BI":
        needed.append((stage, "F", microbatch))
        if stage < stages - 1:
            needed.append((stage + 1, "I", microbatch))
    if action.kind == "W":
        needed.append((stage, "I", microbatch))
    times = [done.get(one) for one in needed]
    return None if None in times else max((time for time in times if time is not None), default=0)
