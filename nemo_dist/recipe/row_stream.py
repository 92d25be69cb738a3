"""Which rows each rank trains on in each step: one endless order of rows, the same for every topology."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import attrs
import torch
from torch import Tensor

from nemo_dist.hf_model import IGNORED
from nemo_dist.recipe.tokens import Row

MULTIPLE = 8  # rows are padded to a multiple of so many tokens


@attrs.define(eq=False, slots=False, kw_only=True)
class RowStream:
    """The rows of a run in order, epoch after epoch, and how many of them were taken, which is its state.

    A step takes ``accumulation`` batches of ``rows_of_batch`` rows for each of ``ranks`` data-parallel ranks, of which
    this is ``rank``. All rows of a step are padded to its longest. The state does not depend on the rank.
    """

    rows: Sequence[Row]
    rows_of_batch: int
    accumulation: int = 1
    ranks: int = 1
    rank: int = 0
    seed: int = 0
    shuffle: bool = True
    pad_token: int = 0
    packing: bool = False
    together: int = 1  # neighbouring rows that stay so
    positions: int | None = None  # that the model has, where it does not take any
    taken: int = 0
    tokens: int = 0  # of the last step, over all ranks, without padding
    _order: tuple[int, Tensor] | None = None

    @property
    def rows_of_step(self) -> int:
        """The rows of one step over all ranks."""
        return self.rows_of_batch * self.accumulation * self.ranks

    def take(self) -> list[dict[str, Tensor]]:
        """Return this rank's batches of the next step."""
        rows = [self.rows[self._index(self.taken + place)] for place in range(self.rows_of_step)]
        self.taken += len(rows)
        return self._own(rows)

    def all(self, most: int | None = None) -> list[dict[str, Tensor]]:
        """Return this rank's batches of all rows, or of the first *most*, once; missing rows have no labels."""
        rows = list(self.rows[:most])
        size = self.rows_of_batch * self.ranks
        rows += [attrs.evolve(rows[0], labels=torch.full_like(rows[0].labels, IGNORED))] * (-len(rows) % size)
        return [batch for start in range(0, len(rows), size) for batch in self._own(rows[start : start + size])]

    def _own(self, rows: Sequence[Row]) -> list[dict[str, Tensor]]:
        longest = max(len(row.tokens) for row in rows)
        width = longest + -longest % MULTIPLE
        if self.positions is not None and not self.packing:  # where they restart, those of padding are 0
            width = max(longest, min(width, self.positions))
        self.tokens = sum(len(row.tokens) for row in rows)
        masked = self.tokens < len(rows) * width
        size = self.rows_of_batch * self.ranks
        starts = range(self.rank * self.rows_of_batch, len(rows), size)
        return [self._batch(rows[start : start + self.rows_of_batch], width, masked) for start in starts]

    def _batch(self, rows: Sequence[Row], width: int, masked: bool) -> dict[str, Tensor]:
        batch = {
            "input_ids": _stacked([row.tokens for row in rows], width, self.pad_token),
            "labels": _stacked([row.labels for row in rows], width, IGNORED),
        }
        if masked:
            batch["attention_mask"] = _stacked([torch.ones_like(row.tokens) for row in rows], width, 0)
        if self.packing:
            places = [torch.cat([torch.arange(length) for length in row.lengths]) for row in rows]
            batch["position_ids"] = _stacked(places, width, 0)
        if rows[0].score is not None:
            batch["reference_scores"] = torch.tensor([row.score for row in rows])
        return batch

    def _index(self, place: int) -> int:
        epoch, within = divmod(place, len(self.rows))
        if not self.shuffle:
            return within
        if self._order is None or self._order[0] != epoch:
            drawn = torch.Generator().manual_seed(_number(f"{self.seed}/{epoch}"))
            self._order = epoch, torch.randperm(len(self.rows) // self.together, generator=drawn)
        group, within = divmod(within, self.together)
        return int(self._order[1][group]) * self.together + within

    @cached_property
    def _digest(self) -> str:
        """What must be equal for a position to mean the same: the rows, and how they are ordered."""
        found = hashlib.blake2b(f"{self.seed} {self.shuffle}".encode(), digest_size=8)
        for row in self.rows:
            found.update(row.tokens.numpy().tobytes())
            found.update(row.labels.numpy().tobytes())
        return found.hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the data, equal on all ranks."""
        return {"taken": self.taken, "rows": len(self.rows), "digest": self._digest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the position of *state*; raise ValueError where it is one in other rows, or in another order."""
        if state["digest"] != self._digest:
            raise ValueError(
                f"the run was at row {state['taken']} of other data ({state['rows']} rows, here are {len(self.rows)}), "
                "or of another seed, length or template; set checkpoint.folder to a new folder to start on this"
            )
        self.taken = state["taken"]


def _stacked(rows: Sequence[Tensor], width: int, fill: int) -> Tensor:
    """Return *rows* as int64 (rows, width), filled up at their ends."""
    made = torch.full((len(rows), width), fill, dtype=torch.int64)
    for index, row in enumerate(rows):
        made[index, : len(row)] = row
    return made


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
