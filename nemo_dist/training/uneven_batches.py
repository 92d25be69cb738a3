"""Take batches in step with the other ranks, whose loaders may have more or fewer.

A step is collective: a rank that has no batch left, or whose loader fails, leaves the others in a collective that never
ends. So before every step all ranks say whether they have a batch, in one all-reduce of a few integers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from nemo_dist.errors import RankError
from nemo_dist.hf_model import IGNORED
from nemo_dist.mesh.rank_group import RankGroup
from nemo_dist.mesh.store_consensus import share
from nemo_dist.plugin.hookspecs import Batch
from nemo_dist.training.router_aux_loss import COUNTED
from nemo_dist.training.step_loss import ROWS

_LABELS = ("labels", "shift_labels")
Batches = Batch | Sequence[Batch]  # what forward_backward takes


def in_step(
    loader: Iterable[Batches], ranks: RankGroup, place: int, pad: bool, padding: Callable[[Any], Any] | None = None
) -> Iterator[Any]:
    """Yield what *loader* gives for as long as it is right on all *ranks*; see :meth:`nemo_dist.Runtime.batches`.

    ``place``: the data-parallel coordinate of this rank. ``padding`` makes what a rank without batches gets of its last
    ones; by default the same without labels.
    """
    taken = _Taken(iter(loader), padding or without_labels)
    padded = 0  # ranks that were without a batch of their own in the last step
    while True:
        taken.fetch(pad)
        having, without, stuck, failed = ranks.total(taken.flags)
        if failed or (stuck and having):
            share("taking the next batch", None, taken.failure or taken.cannot_pad, ranks.ranks)
        if not having:
            return
        if without and not pad:
            _warn(ranks.collect("the end of the batches", lambda: [taken.count, taken.current is not None]))
            return
        if without > padded:
            padded = without
            _refuse_split(ranks.collect("padding batches", lambda: [place, taken.current is not None]))
        yield taken.padding if taken.current is None else taken.current


@attrs.define(eq=False)
class _Taken:
    """What this rank has taken from its loader: ``current`` is None when that has ended."""

    loader: Iterator[Batches]
    pad_with: Callable[[Any], Any]
    count: int = 0
    current: Any = None
    padding: Any = None
    failure: Exception | None = None
    cannot_pad: Exception | None = None

    def fetch(self, pad: bool) -> None:
        last = self.current
        try:
            self.current = next(self.loader, None)
        except Exception as error:
            self.current, self.failure = None, error
            return
        if self.current is not None:
            self.count += 1
        elif pad and self.padding is None:
            self._make_padding(last)

    def _make_padding(self, last: Any) -> None:
        try:
            if last is None:
                raise ValueError(
                    "this rank's loader gave no batch at all, so there is none to pad with; give every rank one"
                )
            self.padding = self.pad_with(last)
        except ValueError as error:
            self.cannot_pad = error

    @property
    def flags(self) -> list[int]:
        """Four flags: has a batch, has none, cannot go on without one, failed."""
        return [self.current is not None, self.current is None, self.cannot_pad is not None, self.failure is not None]


def without_labels(batches: Any) -> Any:
    """Return a copy of *batches*, a batch or a list of them, in which no label, no token and no row counts.

    Raises ValueError for labels that no number leaves out.
    """
    if not isinstance(batches, Mapping):
        return [without_labels(batch) for batch in batches]
    padded = dict(batches)
    for name in _LABELS:
        labels: Tensor | None = padded.get(name)
        if labels is not None and labels.is_floating_point():
            raise ValueError(
                "this rank has no batch left, and float labels cannot be left out of a loss, so none is made up; give "
                "every rank equally many batches, or leave out pad=True"
            )
        if labels is not None:
            padded[name] = torch.full_like(labels, IGNORED)
    tokens = next((padded[name] for name in ("input_ids", "inputs_embeds") if padded.get(name) is not None), None)
    if isinstance(tokens, Tensor):
        padded[COUNTED] = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    rows = next((len(value) for value in padded.values() if isinstance(value, Tensor) and value.ndim), 0)
    return padded | {ROWS: torch.zeros(rows, dtype=torch.int32, device="cpu")}


def _warn(found: Sequence[Sequence[Any]]) -> None:
    """Say which ranks had no more batches, where others did."""
    ended = [rank for rank, (_, more) in enumerate(found) if not more]
    warnings.warn(
        f"rank {', '.join(map(str, ended))} had no more than {found[ended[0]][0]} batches, and the others had more: "
        "the batches end here for all ranks; batches(loader, pad=True) goes on with batches in which no label counts",
        stacklevel=4,
    )


def _refuse_split(found: Sequence[Sequence[Any]]) -> None:
    """Raise RankError when, of ranks that share their batches, only some have one left."""
    lines = []
    for place in sorted({place for place, _ in found}):
        having = [rank for rank, (other, more) in enumerate(found) if other == place and more]
        ended = [rank for rank, (other, more) in enumerate(found) if other == place and not more]
        if having and ended:
            lines.append(f"data-parallel rank {place}: rank {ended} has no batch left, and rank {having} has")
    if lines:
        raise RankError("ranks that share their batches have different numbers of them:\n- " + "\n- ".join(lines))
