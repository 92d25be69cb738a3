"""Know a backward that failed from one that runs, and refuse one whose weights were changed since its forward.

FSDP2 takes the backward after one that failed for the same one, in which it runs what ends it once, and gathers the
weights of now, which are not those that the forward computed with.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import attrs
from torch import nn

from nemo_dist.torch_private import in_backward, run_after_backward
from nemo_dist_fsdp2.groups import name_of, reset


class _Running:
    """One backward: torch keeps it, by its ``end``, until that ends or fails."""

    def end(self) -> None:
        """Do nothing: what ends a backward of FSDP2 says so itself."""


@attrs.define(eq=False)
class Backwards:
    """The backwards of *model*, which FSDP2 has sharded; ``forget`` what is kept of one."""

    model: nn.Module
    forget: Callable[[], None]
    running: weakref.ref[_Running] | None = None

    def begin(self) -> None:
        """Begin one, or go on with one, or with one inside of it."""
        self.recover()
        if self.running is None:
            running = _Running()
            run_after_backward(running.end)
            self.running = weakref.ref(running)

    def end(self) -> None:
        """End one that has not failed."""
        self.running = None

    def recover(self) -> None:
        """Put FSDP2 back in order if the last one failed; no communication."""
        if self.running is not None and self.running() is None:
            self.running = None
            self.forget()
            reset(self.model)

    def recover_before_forward(self, *_: Any) -> None:
        """Do so before a forward that no backward repeats."""
        if not in_backward():
            self.recover()


def refuse_changed_weights(state: Any) -> None:
    """Raise RuntimeError in a backward of the groups of *state*, whose weights were changed since the forward."""
    raise RuntimeError(
        f"weights of {name_of(state)} were changed between a forward and its backward, which fsdp2 would run with the "
        "new ones; change weights, step and load after the backward, or run the forward once more"
    )
