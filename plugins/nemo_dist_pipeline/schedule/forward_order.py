"""Order the forwards of a run without backward, such that sends and receives cannot deadlock; no torch."""

from __future__ import annotations

from functools import lru_cache

from nemo_dist_pipeline.schedule.actions import Action
from nemo_dist_pipeline.schedule.simulation import simulate


@lru_cache(maxsize=64)
def forward_order(owners: tuple[int, ...], microbatches: int) -> tuple[Action, ...]:
    """Return the forwards of all ranks in one list, by the time at which they start; ``owners[stage]`` is a rank.

    All ranks go through this list: the owner of a forward runs it and sends the result, and at the same place the owner
    of the next stage posts the receive. So any two ranks post the messages between them in one order, and no cycle of
    waits can arise, even if nothing is buffered and all messages of a rank share one queue.

    A rank takes as many microbatches as there are ranks through one of its stages before it turns to its next stage:
    that fills the pipeline and bounds the hidden states that wait for it.
    """
    size = 1 + max(owners)
    groups = [range(start, min(start + size, microbatches)) for start in range(0, microbatches, size)]
    lines = tuple(
        tuple(
            Action(stage, "F", index)
            for group in groups
            for stage, owner in enumerate(owners)
            if owner == rank
            for index in group
        )
        for rank in range(size)
    )
    slots = [slot for line in simulate(lines).ranks for slot in line]
    return tuple(slot.action for slot in sorted(slots, key=lambda slot: (slot.start, slot.action.stage)))
