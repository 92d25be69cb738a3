"""Where a check runs, and what it writes down, line by line, so that a check that is stopped keeps what it has."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.distributed as dist


@attrs.frozen(kw_only=True)
class Place:
    """Where a check runs: on the CUDA device or, to try its set-up, on the CPU with everything small.

    ``folder`` is the check's own; ``shared`` is one for all checks of a run.
    """

    cuda: bool
    folder: Path
    shared: Path

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return torch.device("cuda", 0) if self.cuda else torch.device("cpu")

    @property
    def device_type(self) -> str | None:
        """What ``DistributedSetup.build`` is told."""
        return "cuda" if self.cuda else None

    @contextmanager
    def one_rank(self) -> Iterator[None]:
        """Within the context, this process is the only rank: of NCCL on CUDA, of gloo on the CPU."""
        from nemo_dist import initialize_distributed

        initialize_distributed(None if self.cuda else "gloo")
        try:
            yield
        finally:
            dist.destroy_process_group()

    def settle(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def forget_peak(self) -> None:
        """Start to measure the peak of the device's memory anew."""
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float:
        """Return the peak of allocated memory since then, in MiB; 0 on the CPU."""
        return torch.cuda.max_memory_allocated() / 2**20 if self.cuda else 0.0


@attrs.frozen
class Record:
    """The lines of one check, as JSON, one object per line."""

    path: Path

    def note(self, what: str, found: Any) -> None:
        """Write down a number or a text."""
        self._write({"what": what, "found": found})

    def judge(self, what: str, right: bool, found: Any) -> None:
        """Write down what was *found*, and whether it is *right*."""
        self._write({"what": what, "right": bool(right), "found": found})

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Write down an exception of the with-block as wrong, and go on."""
        try:
            yield
        except Exception as error:
            self.judge(what, False, f"{type(error).__name__}: {str(error)[:1500]}")

    def lines(self) -> list[dict[str, Any]]:
        """Return what was written so far."""
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def _write(self, line: dict[str, Any]) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
