"""Make values of the kind of what a batch has, for made-up rows that a weightless copy of a model runs on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor


@attrs.frozen(eq=False)
class MadeUpRows:
    """Makes values of the kind of *entries* of a batch whose tokens are of *shape*, for other rows and lengths.

    An entry is per row if its first size is that of the tokens, and per token if its second is, too.
    """

    entries: Mapping[str, Tensor] = attrs.field(factory=dict)
    shape: Sequence[int] = (1, 1)

    def __call__(self, tokens: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
        """Return *tokens* (rows, length) and *inputs* with entries beside them, or in the place of the tokens."""
        made = {name: self._like(value.detach().cpu(), *tokens.shape) for name, value in self.entries.items()}
        return ({} if "inputs_embeds" in made else {"input_ids": tokens}) | inputs | made

    def rows(self, inputs: Mapping[str, Tensor], rows: Any) -> dict[str, Tensor]:
        """Return *rows* of *inputs*, as this returned them; entries that are not per row stay whole."""
        whole = {name for name, value in self.entries.items() if not self._per_row(value)}
        return {name: value if name in whole else value[rows] for name, value in inputs.items()}

    def _per_row(self, value: Tensor) -> bool:
        return value.ndim > 0 and len(value) == self.shape[0]

    def _like(self, value: Tensor, rows: int, length: int) -> Tensor:
        if not self._per_row(value):
            return value
        chooses = bool(((value == 0) | (value == 1)).all())  # as a mask does
        value = value[torch.arange(rows) % len(value)]
        per_token = value.ndim > 1 and value.shape[1] == self.shape[1]
        if per_token:
            value = value[:, torch.arange(length) % value.shape[1]]
        if not value.numel():
            return value
        mask = uneven_mask(rows, length) if per_token else _first_ones(rows, value[0].numel()).view(value.shape)
        mask = mask.view(*mask.shape, *[1] * (value.ndim - mask.ndim)).expand_as(value).to(value.dtype)
        if not value.is_floating_point():
            return mask if chooses else value
        numbers = 0.6 + 0.5 * torch.arange(value.numel()).mul(0.7).sin().view(value.shape)
        each = torch.logspace(0.5, -0.5, rows).view(-1, *[1] * (value.ndim - 1))
        numbers = (numbers * each).to(value.dtype)  # uneven over rows and tokens, above zero
        if not (chooses and per_token):
            return numbers
        numbers[1:] = 1  # own code may ask what is one
        return numbers * mask


def uneven_mask(rows: int, length: int) -> Tensor:
    """Return a mask (rows, length) of unlike shares of the rows, that leaves out at least half of each at its end."""
    return torch.arange(length) < (length // torch.arange(2, rows + 2))[:, None]


def _first_ones(rows: int, size: int) -> Tensor:
    """Return a mask (rows, size) that leaves out one number more in every row."""
    return torch.arange(size) < size - torch.arange(rows)[:, None]
