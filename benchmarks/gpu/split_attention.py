"""Do the fused kernels that context parallelism calls by itself give what attention over whole sequences gives?"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from record import Place, Record
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nemo_dist_context.packed import attend, has_kernel, sequence_starts, stretch
from nemo_dist_context.ring import Ring
from nemo_dist_context.sequence_layout import SequenceLayout

_LENGTH, _WIDTH = 256, 64
_TOLERANCE = 2e-2  # of a norm, in bfloat16


def _inputs(place: Place) -> list[Tensor]:
    """Return queries of 4 heads, and keys and values of 2, of two rows."""
    dtype = torch.bfloat16 if place.cuda else torch.float32
    generator = torch.Generator().manual_seed(0)
    made = (torch.randn(2, heads, _LENGTH, _WIDTH, generator=generator) for heads in (4, 2, 2))
    return [one.to(place.device, dtype).requires_grad_() for one in made]


def _judge(record: Record, what: str, found: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    """Compare outputs, and the gradients of *inputs*."""
    pairs = [(found, expected)]
    pairs += zip(*(torch.autograd.grad(one.float().sin().sum(), inputs) for one in (found, expected)), strict=True)
    errors = [((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in pairs]
    record.judge(what, max(errors) < _TOLERANCE, [f"{error:.1e}" for error in errors])


def _whole(inputs: list[Tensor], allowed: Tensor) -> Tensor:
    """Return attention in float32, (rows, queries, heads, width)."""
    query, key, value = (one.float() for one in inputs)
    return scaled_dot_product_attention(query, key, value, allowed, enable_gqa=True).transpose(1, 2)


def ring_kernels(place: Place, record: Record) -> None:
    """Ring attention of one rank with two chunks: causal and whole blocks, merged, and their backward."""
    inputs = _inputs(place)
    causal = torch.ones(_LENGTH, _LENGTH, dtype=torch.bool, device=place.device).tril()
    with place.one_rank():
        layout: Any = SequenceLayout(size=1, rank=0, balanced=True)
        ring = Ring(layout=layout, group=dist.group.WORLD, causal=True, scale=_WIDTH**-0.5)
        _judge(
            record, "output, and gradients of query, key, value", ring.attend(*inputs), _whole(inputs, causal), inputs
        )


def packed_kernel(place: Place, record: Record) -> None:
    """The kernel that is told where packed sequences start, for stretches of the queries."""
    if not has_kernel(place.device, torch.bfloat16):
        record.note("packed rows", "no kernel here, so masks are used")
        return
    lengths = ((100, 28, 128), (256,))
    ids = torch.stack([torch.repeat_interleave(torch.tensor(row)) for row in lengths]).int() + 1
    ids = ids.to(place.device)
    starts = sequence_starts(ids) or []
    causal = torch.ones(_LENGTH, _LENGTH, dtype=torch.bool, device=place.device).tril()
    allowed = causal & (ids[:, None, :, None] == ids[:, None, None, :])
    for first, stop in ((0, _LENGTH), (128, _LENGTH), (64, 192)):
        query, key, value = inputs = _inputs(place)
        found = attend(stretch(starts, first, stop, place.device), query[:, :, first:stop], key, value, None)
        expected = _whole([query[:, :, first:stop], key, value], allowed[:, :, first:stop])
        _judge(record, f"queries {first} to {stop}", found, expected, inputs)
