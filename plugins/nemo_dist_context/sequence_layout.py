"""Tell which tokens of a sequence a rank holds: integers, and the index tensors made of them.

A causal query attends to earlier tokens only, so equal contiguous slices are unequal work: the last of 8 ranks would
compute 15 times what the first does. The balanced layout cuts the sequence into twice as many chunks as there are
ranks and gives rank r the r-th from the start and the r-th from the end, as Llama 3 was trained (arXiv:2407.21783).
"""

from __future__ import annotations

from functools import lru_cache

import attrs
import torch


@attrs.frozen(kw_only=True)
class SequenceLayout:
    """How ``size`` ranks split sequences: in contiguous slices or, ``balanced``, one chunk from each end."""

    size: int
    rank: int
    balanced: bool

    @property
    def chunks(self) -> int:
        """The number of equal chunks that a sequence is cut into."""
        return 2 * self.size if self.balanced else self.size

    def padded(self, length: int) -> int:
        """Return the least length from *length* up that divides into chunks."""
        return -(-length // self.chunks) * self.chunks

    def spans(self, length: int, rank: int | None = None) -> tuple[tuple[int, int], ...]:
        """Return what *rank* (by default this one) holds of *length* tokens, which must divide: (start, stop) pairs."""
        rank = self.rank if rank is None else rank
        step = length // self.chunks
        mine = (rank, self.chunks - 1 - rank) if self.balanced else (rank,)
        return tuple((chunk * step, (chunk + 1) * step) for chunk in mine)

    def indices(self, length: int, rank: int | None = None) -> list[int]:
        """Return the positions, in the whole sequence, of the tokens of *rank*, in the order it holds them."""
        return [index for start, stop in self.spans(length, rank) for index in range(start, stop)]

    def gathered(self, length: int) -> list[int]:
        """Return the positions of all tokens when the parts of all ranks are concatenated in rank order."""
        return [index for rank in range(self.size) for index in self.indices(length, rank)]

    def restoring(self, length: int) -> list[int]:
        """Return the inverse of ``gathered``: the index in the concatenated parts of the token at each position."""
        places = [0] * length
        for place, position in enumerate(self.gathered(length)):
            places[position] = place
        return places


@lru_cache(maxsize=32)
def index_of(layout: SequenceLayout, which: str, length: int, device: torch.device) -> torch.Tensor:
    """Return what ``layout`` calls *which* ("indices", "gathered" or "restoring") as an int64 tensor on *device*.

    It is kept: at 131072 tokens making it takes tens of milliseconds, and a device waits for the copy.
    """
    with torch.inference_mode(False):  # a later backward may need it
        return torch.tensor(getattr(layout, which)(length), device=device)
