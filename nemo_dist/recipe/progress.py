"""Show how far a run is: a bar on a terminal, and a line every so many steps for readers of a log."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

Report = Callable[[int, Mapping[str, float]], None]  # called with the step, from 1, and its numbers

# How the numbers of a step are written, those that it has, in this order.
_FORMS: dict[str, Callable[[float], str]] = {
    "loss": lambda value: f"loss {value:.3f}",
    "norm": lambda value: f"norm {value:.2f}",
    "lr": lambda value: f"lr {value:.2e}",
    "tokens_per_second": lambda value: f"{value:,.0f} tokens/s",
    "mfu": lambda value: f"MFU {value:.1%}",
    "memory_gb": lambda value: f"{value:.1f} GB",
    "held_out_loss": lambda value: f"held-out loss {value:.3f}",
}


def in_words(values: Mapping[str, float]) -> str:
    """Return the numbers of a step as one line."""
    return "  ".join(form(values[name]) for name, form in _FORMS.items() if name in values)


def say(line: str) -> None:
    """Write *line* to the log of the run, whose disk may be full: that must not end the run."""
    with suppress(OSError):
        sys.stdout.write(f"{line}\n")


@contextmanager
def progress(steps: int, done: int, every: int, shown: bool) -> Iterator[Report]:
    """Yield what reports a step of a run of so many *steps*, of which *done* were before; nothing unless *shown*."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if not shown:
        yield lambda step, values: None
        return
    console = Console(soft_wrap=True)
    columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("loss {task.fields[loss]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task: Any = bar.add_task("", total=steps, completed=done, loss="?")

        def report(step: int, values: Mapping[str, float]) -> None:
            if "loss" in values:
                bar.update(task, completed=step, loss=f"{values['loss']:.3f}")
            if "loss" not in values or step in (done + 1, steps) or step % every == 0:
                with suppress(OSError):  # as above
                    console.print(f"step {step:>4}/{steps}  {in_words(values)}", highlight=False)

        yield report
