"""Describe the schedule of a step: which rank along an axis works on which microbatch when; no torch."""

from __future__ import annotations

from collections.abc import Mapping

import attrs


@attrs.frozen
class Task:
    """One piece of work: its kind (a letter), stage and microbatch, and from when to when, in units of time."""

    kind: str
    stage: int
    microbatch: int
    start: int
    end: int


@attrs.frozen(kw_only=True)
class StepSchedule:
    """What every rank along ``axis`` does in a step, in order.

    ``lanes``: for each coordinate of the axis its tasks. ``kinds``: what each kind of task is, where "F" is a
    forward, "B" a whole backward, "I" its part for the inputs and "W" its part for the weights. ``owners``: the
    coordinate that each stage is on. ``modules``: the full names of each stage's modules; empty where no model is
    known. ``microbatches``: of the step; the lanes may show fewer, and ``notes`` then say so. ``rows``: sequences in a
    microbatch. ``idle``: the share of time that ranks wait, from 0 to 1, if all stages take equally long.
    """

    axis: str
    name: str
    lanes: tuple[tuple[Task, ...], ...]
    kinds: Mapping[str, str]
    owners: tuple[int, ...]
    modules: tuple[tuple[str, ...], ...] = ()
    microbatches: int
    rows: int
    idle: float
    notes: tuple[str, ...] = ()

    @property
    def drawn(self) -> int:
        """The number of microbatches that the lanes show."""
        return 1 + max(task.microbatch for lane in self.lanes for task in lane)

    def held(self, stage: int) -> int:
        """Return for how many microbatches *stage* holds activations at most: forwards that wait for a backward."""
        now = most = 0
        for task in self.lanes[self.owners[stage]]:
            if task.stage == stage:
                now += (task.kind == "F") - (task.kind in ("B", "W"))  # "I" is followed by "W", which needs them too
                most = max(most, now)
        return self.microbatches if most == self.drawn else most
