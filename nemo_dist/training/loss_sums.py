"""Refuse a loss of the user's own that does not add up over rows or tokens, where these are apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor

from nemo_dist.plugin.hookspecs import Batch
from nemo_dist.torch_private import changes_in_place, tensors_in
from nemo_dist.training.whole_rows import chosen, sizes_of

Sums = tuple[Tensor, Tensor]  # the sum of losses, and what counts
_Call = tuple[Any, Batch]
Run = Callable[[Any, Batch], Sums]

_TOLERANCE, _OF_HALVES = 1e-2, 5e-2  # relative: the second where outputs have half precision, in which users may sum


@attrs.define(kw_only=True)
class LossSums:
    """Judges a loss in its first call by two parts of the batch, whose sums and counts must add up to those of both.

    ``dims``: 0 where rows are apart, 1 where tokens are. A batch of one part gets another, with half of its numbers.
    What draws random numbers, writes into its arguments, or gives another value when it is called again, is not judged,
    nor what does not run on a part. Ranks make the same number of calls, as some losses run models that other ranks
    wait for.
    """

    dims: tuple[int, ...] = ()
    done: bool = False

    def __call__(self, run: Run, outputs: Any, view: Batch, together: int, name: str) -> Sums:
        """Return what *run* makes of *outputs* and *view*; raise ValueError if that is no sum over parts of them.

        *together* neighbouring rows are never in two parts; *name* is that of the loss.
        """
        if self.done or not self.dims or not hasattr(outputs, "items"):
            return run(outputs, view)
        given = [one for one in tensors_in([dict(outputs.items()), dict(view)]) if not one.is_inference()]
        before = _draws(given), [changes_in_place(one) for one in given]
        found = run(outputs, view)
        self.done = True
        pure = _same_draws(before[0], _draws(given)) and before[1] == [changes_in_place(one) for one in given]
        if pure and type(found[0]) is Tensor and not found[0].is_meta:
            for dim in self.dims:
                _judge(run, found, outputs, view, dim, together if dim == 0 else 1, name)
        return found


def _judge(run: Run, found: Sums, outputs: Any, view: Batch, dim: int, together: int, name: str) -> None:
    sizes = sizes_of(view)
    if sizes is None:
        return
    size, tensors = sizes[dim], tensors_in(dict(view))
    middle = size // together // 2 * together
    whole: _Call = outputs, view
    parts: list[_Call] = [whole, whole]
    if middle:
        halves = (slice(0, middle), slice(middle, size))
        parts = [chosen(outputs, view, dim, sizes, partial(_part, dim, half)) for half in halves]
    elif dim == 0 and all(one.shape[:1] in ((), (size,)) for one in tensors):  # unlike the ends of packed sequences
        whole = chosen(outputs, view, dim, sizes, lambda value: torch.cat([value, _other(value)]))
        parts[1] = chosen(outputs, view, dim, sizes, _other)
    else:
        return
    answers = list(_answers(run, [*parts, whole]))
    if len(answers) < 3:
        return
    first, second, both = answers
    tolerance = _TOLERANCE if all(one.itemsize > 2 for one in _floating(outputs)) else _OF_HALVES
    if not _close([one.item() for one in found], both if middle else first, tolerance):
        return
    added = tuple(one + other for one, other in zip(first, second, strict=True))
    if all(map(math.isfinite, both)) and not _close(both, added, tolerance, [*first, *second]):
        what = "rows" if dim == 0 else "tokens"
        raise ValueError(
            f"the loss {name} does not add up over {what}, which are on several ranks or in several microbatches: of "
            f"all {what} its sum is {both[0]:g} and its count {both[1]:g}, of two parts of them {first[0]:g} + "
            f"{second[0]:g} and {first[1]:g} + {second[1]:g}; return the loss of every token or row and its weight, "
            "or their sum and count, no mean. If it compares neighbouring rows, set its attribute rows_together to "
            "their number; if all rows, to None, and gather those of all ranks, as nemo_dist.losses.Contrastive does"
        )


def _other(value: Tensor) -> Tensor:
    """Return rows that are unlike those of *value*, for a loss that compares rows."""
    return value / 2 if value.is_floating_point() else value


def _part(dim: int, part: slice, value: Tensor) -> Tensor:
    return value[(slice(None),) * dim + (part,)]


def _answers(run: Run, calls: list[_Call]) -> Iterator[tuple[float, float]]:
    for outputs, view in calls:
        with suppress(Exception), torch.no_grad():
            total, count = run(outputs, view)
            yield total.item(), count.item()


def _close(found: Sequence[float], wanted: Sequence[float], tolerance: float, terms: Sequence[float] = ()) -> bool:
    """Whether sum and count are equal, within the rounding of the *terms* that they were made of."""
    scales = [max(abs(one) for one in (found[at], wanted[at], *terms[at::2])) for at in (0, 1)]
    return all(
        abs(one - other) <= tolerance * scale or not math.isfinite(one)
        for one, other, scale in zip(found, wanted, scales, strict=True)
    )


def _floating(outputs: Any) -> list[Tensor]:
    return [one for one in tensors_in(dict(outputs.items())) if one.is_floating_point()]


def _draws(given: list[Tensor]) -> list[Tensor]:
    """Return the state of the generators that a loss of the tensors *given* may draw from."""
    devices = {one.device for one in given if one.device.type == "cuda"}
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


def _same_draws(before: list[Tensor], after: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
