"""Ring attention: keys and values go round the cp ranks, each of which attends to the part that it has at the time.

No rank ever holds the keys of the whole sequence (arXiv:2310.01889). Each part gives outputs and the logarithm of the
sum of their weights, by which they are merged; the backward of torch's fused kernels takes those of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_dist.torch_private import FLASH_ATTENTION, FLASH_ATTENTION_ON_CPU, collective_operators
from nemo_dist_context.flash import has_flash, takes_width
from nemo_dist_context.sequence_layout import SequenceLayout

_cuda, _cuda_backward = (getattr(torch.ops.aten, name) for name in FLASH_ATTENTION)
_cpu, _cpu_backward = (getattr(torch.ops.aten, name) for name in FLASH_ATTENTION_ON_CPU)


def fits(query: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether torch has a fused attention for these inputs that returns what merging needs."""
    width = query.shape[-1]
    if dropout or value.shape[-1] != width:
        return False
    return query.device.type == "cpu" or (takes_width(width) and has_flash(query.device, query.dtype))


@attrs.frozen(kw_only=True, eq=False)
class Ring:
    """How the ranks of *group* attend: ``scale`` of the scores, and whether a query sees only keys up to its own."""

    layout: SequenceLayout
    group: Any
    causal: bool
    scale: float

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return the attention of this rank's queries over the keys of all ranks, (rows, queries, heads, width).

        *query* is (rows, heads, part, width), *key* and *value* (rows, key heads, part, width); all cp ranks take part.
        """
        found: Tensor = _Attention.apply(query, key, value, self)  # type: ignore[no-untyped-call]
        return found.transpose(1, 2).contiguous()

    def blocks(self, turn: int) -> Iterator[tuple[int, int, bool]]:
        """Yield which chunks of this rank's queries see which chunks of the keys held in *turn*, and whether causally.

        Chunks are numbered as the ranks hold them, from 0.
        """
        length = self.layout.chunks  # as if every chunk were one token
        source = (self.layout.rank - turn) % self.layout.size
        for one, (mine, _) in enumerate(self.layout.spans(length)):
            for other, (theirs, _) in enumerate(self.layout.spans(length, source)):
                if not self.causal or theirs <= mine:
                    yield one, other, self.causal and theirs == mine

    def pass_on(self, part: Tensor) -> Callable[[], Tensor]:
        """Begin to send *part* to the next rank; return what waits for that of the rank before. All cp ranks take part.

        What is computed meanwhile hides the transfer.
        """
        size, rank = self.layout.size, self.layout.rank
        out, into = [0] * size, [0] * size
        out[(rank + 1) % size] = into[(rank - 1) % size] = part.numel()
        coming = collective_operators.all_to_all_single(part.reshape(-1), into, out, self.group.group_name)
        return lambda: collective_operators.wait_tensor(coming).view(part.shape)

    def turns(self, pair: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the keys and values of every rank, those of this one first, each with its number."""
        for turn in range(self.layout.size):
            last = turn == self.layout.size - 1
            arrived = None if last else self.pass_on(pair)
            yield turn, pair
            if arrived is not None:
                pair = arrived()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, ring: Ring) -> Tensor:
        chunks = len(ring.layout.spans(ring.layout.chunks))
        queries = [part.contiguous() for part in query.chunk(chunks, dim=2)]
        merged: list[tuple[Tensor, Tensor] | None] = [None] * chunks
        for turn, pair in ring.turns(torch.stack((key, value))):
            keys, values = (_chunks(part, chunks, query.shape[1]) for part in pair)
            for one, other, causal in ring.blocks(turn):
                new = _forward(queries[one], keys[other], values[other], causal, ring.scale)
                merged[one] = _merged(merged[one], new)
        whole = [part for part in merged if part is not None]  # every query sees its own chunk
        ctx.ring, ctx.chunks = ring, chunks
        found = torch.cat([out for out, _ in whole], dim=2).to(query.dtype)
        ctx.save_for_backward(query, key, value, found, torch.cat([weight for _, weight in whole], dim=2))
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ring, chunks = ctx.ring, ctx.chunks
        query, key, value, found, weights = ctx.saved_tensors
        cut = ([part.contiguous() for part in x.chunk(chunks, dim=2)] for x in (grad, query, found, weights))
        grads, queries, outputs, sums = cut
        of_query = [torch.zeros_like(part, dtype=weights.dtype) for part in queries]
        of_pair = torch.zeros((2, *key.shape), dtype=weights.dtype, device=key.device)
        for turn, pair in ring.turns(torch.stack((key, value))):
            keys, values = (_chunks(part, chunks, query.shape[1]) for part in pair)
            # Views: what is added to them is added to the gradients that go round after their keys and values.
            of_keys, of_values = (part.chunk(chunks, dim=2) for part in of_pair)
            for one, other, causal in ring.blocks(turn):
                inputs = queries[one], keys[other], values[other], outputs[one], sums[one]
                news = [part.to(weights.dtype) for part in _backward(grads[one], *inputs, causal, ring.scale)]
                of_query[one] += news[0]
                of_keys[other].add_(_summed(news[1], key.shape[1]))
                of_values[other].add_(_summed(news[2], key.shape[1]))
            of_pair = ring.pass_on(of_pair)()  # after the last turn they are home
        of_key, of_value = of_pair.to(key.dtype)
        return torch.cat(of_query, dim=2).to(query.dtype), of_key, of_value, None


def _chunks(part: Tensor, chunks: int, heads: int) -> list[Tensor]:
    """Cut keys or values into chunks along the sequence, repeated for as many *heads* as there are of queries."""
    groups = heads // part.shape[1]
    return [chunk.repeat_interleave(groups, dim=1) for chunk in part.chunk(chunks, dim=2)]


def _summed(grad: Tensor, heads: int) -> Tensor:
    """Sum the gradients of repeated key heads."""
    summed: Tensor = grad.unflatten(1, (heads, -1)).sum(2)
    return summed


def _merged(old: tuple[Tensor, Tensor] | None, new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the outputs, in the dtype of the log-sums of weights, and these, of two sets of keys as those of both."""
    out, weight = new[0].to(new[1].dtype), new[1]
    if old is None:
        return out, weight
    both = torch.logaddexp(old[1], weight)
    shares = [(one - both).exp().unsqueeze(-1) for one in (old[1], weight)]
    return old[0] * shares[0] + out * shares[1], both


def _forward(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Return the outputs and the log-sums of weights, (rows, heads, queries)."""
    if query.is_cuda:
        found = _cuda(query, key, value, 0.0, causal, scale=scale)
    else:
        found = _cpu(query, key, value, 0.0, causal, scale=scale)
    return found[0], found[1]


def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, weights: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of *query*, *key* and *value*, where *out* and *weights* are those of all keys."""
    given = grad, query, key, value, out, weights
    if query.is_cuda:
        lengths = None, None, query.shape[2], key.shape[2]
        seed = torch.zeros(2, dtype=torch.uint64, device=key.device)  # of a dropout that is off
        found = _cuda_backward(*given, *lengths, 0.0, causal, seed, seed.new_empty(()), scale=scale)
    else:
        found = _cpu_backward(*given, 0.0, causal, scale=scale)
    return found[0], found[1], found[2]
