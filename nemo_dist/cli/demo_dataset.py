"""A dataset of real text that every machine has: the sources of Python's standard library, as bytes."""

from __future__ import annotations

import random
import sysconfig
from functools import cache
from pathlib import Path

import attrs
import torch
from torch import Tensor
from torch.utils.data import Dataset

_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_HELD_OUT = 20  # every 20th file is held out from training


@cache
def _sources() -> tuple[Path, ...]:
    library = Path(sysconfig.get_path("stdlib"))
    found = sorted(
        path for path in library.rglob("*.py") if not _LEFT_OUT.intersection(path.relative_to(library).parts)
    )
    if len(found) < _HELD_OUT:
        raise FileNotFoundError(
            f"the demo reads the sources of Python's standard library, but {library} has {len(found)} *.py files; "
            "use a Python that is installed with its sources"
        )
    return tuple(found)


@cache
def read(held_out: bool) -> Tensor:
    """Return the text as a 1-D uint8 tensor: the held-out files, or all others, in the order of their paths."""
    chosen = [path for index, path in enumerate(_sources()) if (index % _HELD_OUT == 0) == held_out]
    return torch.frombuffer(bytearray(b"\n".join(path.read_bytes() for path in chosen)), dtype=torch.uint8)


@attrs.frozen(eq=False)
class Windows(Dataset[dict[str, Tensor]]):
    """*count* random windows of *length* bytes; item i is the same on every rank and every topology.

    An item is ``input_ids`` and ``labels``, both the same bytes as int64 of shape ``(length,)``; the model shifts them.
    """

    count: int
    length: int
    seed: int
    held_out: bool = False

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        text = read(self.held_out)
        start = random.Random(f"{self.seed}/{index}").randrange(len(text) - self.length)
        window = text[start : start + self.length].long()
        return {"input_ids": window, "labels": window.clone()}


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack items into a batch of tensors of shape ``(len(items), length)``."""
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}
