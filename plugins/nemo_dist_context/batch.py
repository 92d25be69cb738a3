"""Split a batch along the sequence: pad it, shift its labels, number its sequences, and keep this rank's tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.nn.functional import pad

from nemo_dist.hf_model import IGNORED
from nemo_dist.training.router_aux_loss import COUNTED
from nemo_dist_context.sequence_layout import SequenceLayout, index_of

SEQUENCES = "sequence_ids"  # only a split batch has it; the model's forward pre-hook takes it out again
APPENDED = -1  # the sequence id of padding that makes the length divide
# How models number tokens when a batch has no positions: by place in the row, whatever the mask; by counting the tokens
# that the mask lets count; by counting those that are not the padding token, from the number of that one on.
NUMBERINGS = ("places", "mask", "tokens")
_FILL = {
    COUNTED: 0,
    "input_ids": 0,
    "inputs_embeds": 0,
    "labels": IGNORED,
    "shift_labels": IGNORED,
    "position_ids": 0,
    "token_type_ids": 0,
}


@attrs.frozen(kw_only=True)
class SequenceSplitter:
    """Split the batches of one model.

    ``shifts``: the model's loss compares a token's output with the next label. ``numbering``: how the model numbers the
    tokens of a batch without positions, one of ``NUMBERINGS``. ``causal``: positions of a batch that restart mean
    packed sequences. ``pad_token``: the number of the padding token, if any.
    """

    layout: SequenceLayout
    shifts: bool
    numbering: str
    causal: bool
    pad_token: int | None = None

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return this rank's part of *batch*: tensors of (rows, length, ...) -> (rows, padded length / size, ...).

        ``sequence_ids`` (rows, padded length) gives, for the tokens of all ranks, the sequence of the row that each
        belongs to: from 1 up, 0 where ``attention_mask`` is 0, -1 for padding. ``counted_tokens`` (rows, padded length
        / size) says which tokens of this rank are neither masked nor padding. Raises ValueError for a tensor that
        cannot be split.
        """
        rows, length = _shape(batch)
        tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        _refuse(tensors, rows, length)
        mask = tensors.pop("attention_mask", None)
        device = next(iter(tensors.values())).device
        packs = self.causal and "position_ids" in tensors
        if "position_ids" not in tensors:
            tensors["position_ids"] = self._positions(mask, tensors.get("input_ids"), rows, length, device)
        ids = sequence_ids(mask, tensors["position_ids"], packs).expand(rows, length)
        counted = tensors.pop(COUNTED, None)
        if self.shifts and "labels" in tensors:
            tensors.setdefault("shift_labels", pad(tensors["labels"], (0, 1), value=IGNORED)[:, 1:])
            tensors["labels"] = tensors["shift_labels"]  # the loss function reads only the shifted ones
        whole = self.layout.padded(length)
        index = index_of(self.layout, "indices", whole, device)
        parts = {name: _padded(value, whole, _FILL[name]).index_select(1, index) for name, value in tensors.items()}
        others = {name: value for name, value in batch.items() if not isinstance(value, Tensor)}
        ids = _padded(ids, whole, APPENDED)
        counts = ids > 0 if counted is None else _padded(counted, whole, 0) != 0
        return {**others, **parts, SEQUENCES: ids, COUNTED: counts.index_select(1, index)}

    def _positions(self, mask: Tensor | None, tokens: Tensor | None, rows: int, length: int, device: Any) -> Tensor:
        """Return the positions that the model would give the tokens of a batch, (rows or 1, length)."""
        places = torch.arange(length, device=device).unsqueeze(0)
        if self.numbering == "mask":
            real = torch.ones_like(places) if mask is None else (mask != 0).long()
            return real.cumsum(1) * real - 1
        if self.numbering == "tokens":
            if tokens is None:
                raise ValueError(
                    "this model numbers its tokens by which of them are padding, which inputs_embeds do not tell; add "
                    "position_ids of shape (rows, length) to the batch"
                )
            first = self.pad_token or 0
            real = (tokens != first).long()
            return real.cumsum(1) * real + first
        return places


def split_tokens(layout: SequenceLayout, value: Tensor, fill: float) -> Tensor:
    """Return this rank's tokens of *value*, (rows, length, ...), filled up with *fill* to a length that divides."""
    whole = layout.padded(value.shape[1])
    return _padded(value, whole, fill).index_select(1, index_of(layout, "indices", whole, value.device))


def sequence_ids(mask: Tensor | None, positions: Tensor, packs: bool) -> Tensor:
    """Return the sequence ids, int32, of a batch: from its mask, or from positions (rows, length) that restart.

    As in transformers, positions matter only where there is no mask; *packs*: where they came with the batch, and
    attention is causal.
    """
    if mask is not None:
        return (mask != 0).int()
    if not packs:
        return torch.ones_like(positions, dtype=torch.int32)
    restarts = positions.diff(dim=1, prepend=positions[:, :1] - 1) != 1
    return restarts.cumsum(1, dtype=torch.int32) + 1


def _shape(batch: Mapping[str, Any]) -> tuple[int, int]:
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(batch.get(name), Tensor):
            rows, length = batch[name].shape[:2]
            return rows, length
    raise ValueError(f"the batch has neither input_ids nor inputs_embeds (it has {sorted(batch)}); add one")


def _refuse(tensors: Mapping[str, Tensor], rows: int, length: int) -> None:
    """Raise ValueError for tensors that do not have one value, or one vector, per token."""
    problems = []
    for name, value in tensors.items():
        dims = 3 if name == "inputs_embeds" else 2
        rows_wanted = (1, rows) if name == "position_ids" else (rows,)
        if name not in _FILL and name != "attention_mask":
            problems.append(f"{name} {tuple(value.shape)} cannot be split along the sequence; leave it out")
        elif value.ndim != dims or value.shape[0] not in rows_wanted or value.shape[1] != length:
            problems.append(
                f"{name} must have shape ({rows}, {length}{', width' * (dims - 2)}) (got {tuple(value.shape)})"
            )
    if problems:
        raise ValueError("context parallelism cannot split the batch:\n" + "\n".join(f"- {line}" for line in problems))


def _padded(value: Tensor, length: int, fill: float) -> Tensor:
    more = length - value.shape[1]
    return pad(value, (0, 0) * (value.ndim - 2) + (0, more), value=fill) if more else value
