"""Write the numbers of a run: a line of JSON for each step always, TensorBoard and Weights & Biases where asked for."""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import attrs

from nemo_dist.recipe.config import LoggingSection

FILE = "metrics.jsonl"
Write = Callable[[int, Mapping[str, float]], None]


def judge_logging(section: LoggingSection) -> None:
    """Raise ValueError for a package that is asked for and not installed."""
    asked = {"tensorboard": section.tensorboard, "wandb": section.wandb is not None}
    missing = [name for name, wanted in asked.items() if wanted and find_spec(name) is None]
    if missing:
        raise ValueError(
            f"logging asks for {' and '.join(missing)}, which is not installed; pip install {' '.join(missing)}"
        )


@attrs.define(eq=False)
class Metrics:
    """Where rank 0 writes its numbers; of the other ranks nothing is written."""

    writers: list[Write] = attrs.field(factory=list)
    closing: list[Callable[[], None]] = attrs.field(factory=list)

    @classmethod
    def open(cls, section: LoggingSection, folder: Path, done: int, recipe: Mapping[str, Any]) -> Metrics:
        """Return the metrics of a run that goes on after step *done*; lines of later steps are dropped.

        The numbers of a run that does not go on here stay beside, in ``metrics.jsonl.1`` and so on.
        """
        folder.mkdir(parents=True, exist_ok=True)
        made = cls()
        lines = _Lines.after(folder / FILE, done)
        made.writers.append(lines.write)
        if section.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            board: Any = SummaryWriter(str(folder), purge_step=done + 1)
            made.writers.append(lambda step, values: _to_board(board, step, values))
            made.closing.append(board.close)
        if section.wandb is not None:
            import wandb

            run: Any = wandb.init(**{"config": dict(recipe), "dir": str(folder), **section.wandb})
            made.writers.append(lambda step, values: run.log(dict(values), step=step))
            made.closing.append(lambda: run.finish(exit_code=int(sys.exc_info()[0] is not None)))
        return made

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the *values* of *step*; a disk that fails is a warning, as the run itself does not need them."""
        for writer in self.writers:
            try:
                writer(step, values)
            except OSError as error:
                # The same words at every step, so that Python prints them once.
                warnings.warn(f"numbers of the run cannot be written, and it goes on without: {error}", stacklevel=2)

    def close(self) -> None:
        """Finish what others than this file's lines need to be told."""
        for close in self.closing:
            close()


@attrs.frozen(eq=False)
class _Lines:
    """A file with a line of JSON for each time that numbers were written; ``left`` are those that it could not take."""

    path: Path
    left: list[str] = attrs.field(factory=list)

    @classmethod
    def after(cls, path: Path, done: int) -> _Lines:
        """Return the file at *path* without its lines of steps above *done*, which will be trained again.

        Where that is every step, the file is one of an earlier run, and is kept beside.
        """
        if done == 0 and path.is_file():
            numbers = (number for number in count(1) if not Path(f"{path}.{number}").exists())
            path.rename(f"{path}.{next(numbers)}")
        before = path.read_text(errors="replace") if path.is_file() else None
        kept = "".join(f"{line}\n" for line in (before or "").splitlines() if _is_until(line, done))
        if kept != before:
            beside = path.with_name(f".{path.name}.partial")  # a full disk must not cost the old numbers
            beside.write_text(kept)
            beside.replace(path)
        return cls(path)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append the line of *values*, after those that are left; where the disk fails, the file stays as it was."""
        numbers = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN
        self.left.append(json.dumps({"step": step, **numbers}, allow_nan=False) + "\n")
        whole = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a") as file:
                file.write("".join(self.left))
        except OSError as error:
            with suppress(OSError):  # half a line
                os.truncate(self.path, whole)
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self.left.clear()


def _is_until(line: str, done: int) -> bool:
    """Whether *line* has numbers of a step up to *done*; not where the process was killed while it wrote the line."""
    try:
        return bool(json.loads(line)["step"] <= done)
    except (ValueError, KeyError, TypeError):
        return False


def _to_board(board: Any, step: int, values: Mapping[str, float]) -> None:
    for name, value in values.items():
        board.add_scalar(name, value, step)
    board.flush()  # a rank that is ended takes with it what is not in the file
