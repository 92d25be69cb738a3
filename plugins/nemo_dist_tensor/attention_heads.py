"""Tell which attention heads a tensor-parallel rank computes, and which numbers of heads do not fit."""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor, nn


@attrs.frozen
class AttentionHeads:
    """The heads of one attention module over ``ranks``: query heads, and how many of them share a key head (groups)."""

    queries: int
    groups: int
    ranks: int

    @classmethod
    def of(cls, attention: Any, ranks: int) -> AttentionHeads | None:
        """Return the heads of the module *attention*, or None when it is not an attention with heads."""
        size = getattr(attention, "head_dim", None) or getattr(attention, "head_size", None)
        if not isinstance(size, int):
            return None
        queries = getattr(getattr(attention, "config", None), "num_attention_heads", None)
        if not isinstance(queries, int):
            if not isinstance(getattr(attention, "q_proj", None), nn.Linear):
                return None
            queries = attention.q_proj.out_features // size
        return cls(queries, int(getattr(attention, "num_key_value_groups", 1)), ranks)

    @property
    def keys(self) -> int:
        """The number of key heads."""
        return self.queries // self.groups

    @property
    def problem(self) -> str:
        """Why the query heads do not divide over the ranks, or an empty string."""
        if self.queries % self.ranks == 0:
            return ""
        fitting = [str(n) for n in range(2, self.queries + 1) if self.queries % n == 0]
        return (
            f"{self.queries} attention heads do not divide over {self.ranks} tensor-parallel ranks; "
            f"use a tp_size of {', '.join(fitting)}"
        )

    @property
    def whole_keys(self) -> bool:
        """Whether every rank holds the weights of all key heads, which do not divide, and computes those it needs."""
        return self.keys % self.ranks != 0

    def needed(self, rank: int) -> list[int]:
        """Return the key heads that *rank* computes, in query order and repeated where needed to serve equally many."""
        mine = self.queries // self.ranks
        wanted = [query // self.groups for query in range(rank * mine, (rank + 1) * mine)]
        distinct = sorted(set(wanted))
        even = len({wanted.count(key) for key in distinct}) == 1
        return distinct if even else wanted

    def local_groups(self, rank: int) -> int:
        """Return how many query heads of *rank* share each key head that it computes."""
        return self.queries // self.ranks // len(self.needed(rank))


def pick(parameter: Tensor, heads: AttentionHeads, rank: int) -> Tensor:
    """Return the rows of a key or value projection, or of its bias, for the heads that *rank* computes."""
    needed = heads.needed(rank)
    by_head: Tensor = parameter.unflatten(0, (heads.keys, -1))
    if needed == list(range(needed[0], needed[-1] + 1)):
        mine = by_head[needed[0] : needed[-1] + 1]
    else:
        mine = by_head[torch.tensor(needed, device=parameter.device)]
    return mine.flatten(0, 1)
