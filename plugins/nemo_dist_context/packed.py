"""Attend over packed sequences with a kernel that is told where they start, in the place of a mask of all pairs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from inspect import signature
from itertools import pairwise
from typing import Any

import attrs
import torch
from torch import Tensor

from nemo_dist_context.flash import has_flash, takes_width


@attrs.frozen(kw_only=True, eq=False)
class Stretch:
    """Which keys a stretch of queries needs, where queries and keys are those of packed sequences.

    ``keys``: for every row, the first key and the one after the last. ``query_ends`` and ``key_ends``: int32, where the
    sequences of all rows end, one row after the other, from 0 on. ``longest``: the most queries, and the most keys, of
    a sequence.
    """

    keys: tuple[tuple[int, int], ...]
    query_ends: Tensor
    key_ends: Tensor
    longest: tuple[int, int]


@attrs.frozen(kw_only=True, eq=False)
class Packed:
    """Packed sequences: the ``ids`` of all tokens, (rows, length), and the ``stretches`` of queries of this rank."""

    ids: Tensor
    stretches: tuple[Stretch, ...]


def sequence_starts(ids: Tensor) -> list[list[int]] | None:
    """Return, for each row of *ids*, where its sequences start; None where tokens are masked. The host waits for it."""
    if (ids == 0).any():
        return None
    found: list[list[int]] = [[] for _ in ids]
    for row, column in ids.diff(dim=1, prepend=torch.zeros_like(ids[:, :1])).nonzero().tolist():
        found[row].append(column)
    return found


def stretch(starts: Sequence[Sequence[int]], first: int, stop: int, device: torch.device) -> Stretch:
    """Return the ``Stretch`` of the queries from *first* until *stop* of every row, whose sequences have *starts*."""
    keys, queries_of, keys_of = [], [], []
    for row in starts:
        own = [max(start for start in row if start <= first), *(start for start in row if first < start < stop), stop]
        keys.append((own[0], stop))
        keys_of += [end - start for start, end in pairwise(own)]
        queries_of += [end - max(start, first) for start, end in pairwise(own)]
    ends = [torch.tensor([0, *lengths]).cumsum(0).int().to(device) for lengths in (queries_of, keys_of)]
    longest = max(queries_of), max(keys_of)
    return Stretch(keys=tuple(keys), query_ends=ends[0], key_ends=ends[1], longest=longest)


@cache
def kernel() -> Any:
    """Return torch's attention over sequences of any lengths that share heads; None where this torch has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "enable_gqa" in signature(varlen_attn).parameters else None


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether *device* has a kernel for numbers of *dtype*."""
    return kernel() is not None and has_flash(device, dtype)


def fits(query: Tensor, value: Tensor, options: Any) -> bool:
    """Whether the kernel computes what an attention with these inputs and *options* does."""
    width = query.shape[-1]
    return value.shape[-1] == width and takes_width(width) and not options.get("dropout")


# Not compiled: lengths differ from batch to batch, and each would be compiled anew.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend(part: Stretch, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Return the causal attention of a stretch of queries, (rows, heads, queries, width), over all keys of their rows.

    The result is (rows, queries, heads, width).
    """
    run = kernel()
    rows, heads, length, width = query.shape
    flat = [
        torch.cat([one[row, :, first:stop].transpose(0, 1) for row, (first, stop) in enumerate(part.keys)])
        for one in (key, value)
    ]
    found: Tensor = run(
        query.transpose(1, 2).reshape(rows * length, heads, width),
        *flat,
        part.query_ends,
        part.key_ends,
        *part.longest,
        scale=scale,
        window_size=(-1, 0),  # causal, where the last query is that of the last key
        enable_gqa=heads != key.shape[1],
    )
    return found.view(rows, length, heads, width)
