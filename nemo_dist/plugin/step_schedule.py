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
    coordinate that each stage is on. ``microbatches``: of the step; the lanes may show fewer, and ``notes`` then say
    so. ``problem``: why the batch does not fit the schedule, which is then drawn with another. ``rows``: sequences in a
    microbatch. ``idle``: the share of time that ranks wait, from 0 to 1, if all stages take equally long.
    """

    axis: str
    name: str
    lanes: tuple[tuple[Task, ...], ...]
    kinds: Mapping[str, str]
    owners: tuple[int, ...]
    microbatches: int
    rows: int
    idle: float
    notes: tuple[str, ...] = ()
    problem: str = ""
