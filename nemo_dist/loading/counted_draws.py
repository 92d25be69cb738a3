"""Random numbers by their index: element *i* of a draw is a function of a key and *i*, so any slice costs what it has.

The generator is Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), NumPy's. Element *i* takes
half of the 64-bit number *i // 2*; two normal values are made of the two halves by the method of Box and Muller.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence

import attrs
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# A draw is computed in whole blocks of the global tensor, so that an element has the same place in a vector register
# whatever slice it is in: the last bit of a vectorised logarithm depends on that.
_BLOCK = 64
_MOST = 1 << 15  # elements at once: they stay in the cache, and torch does not share them out to threads


Bits = npt.NDArray[np.uint32]  # 32 random bits for each element


@attrs.frozen
class Constant:
    """Every element has this value."""

    value: float

    def of(self, bits: Bits) -> Tensor:
        """Return the values of the elements that have the random *bits*."""
        return torch.full((len(bits),), self.value)


@attrs.frozen
class Uniform:
    """From *low* up to *high*."""

    low: float = 0.0
    high: float = 1.0

    def of(self, bits: Bits) -> Tensor:
        """Return the values of the elements that have the random *bits*."""
        return _float((bits >> 8).astype(np.uint32)).mul_(2.0**-24 * (self.high - self.low)).add_(self.low)


@attrs.frozen
class Normal:
    """The normal distribution."""

    mean: float = 0.0
    std: float = 1.0

    def of(self, bits: Bits) -> Tensor:
        """Return the values of the elements that have the random *bits*."""
        pairs = _float(bits).view(-1, 2)
        radius = pairs[:, 0].add(0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_().mul_(self.std)
        angle = pairs[:, 1].mul(2.0**-31 * math.pi)
        made = torch.empty_like(pairs)
        torch.mul(radius, angle.cos(), out=made[:, 0])
        torch.mul(radius, angle.sin_(), out=made[:, 1])
        return made.view(-1).add_(self.mean)


@attrs.frozen
class TruncatedNormal:
    """The normal distribution between *low* and *high*."""

    mean: float = 0.0
    std: float = 1.0
    low: float = -2.0
    high: float = 2.0

    def of(self, bits: Bits) -> Tensor:
        """Return the values of the elements that have the random *bits*."""
        mirrored = self.low + self.high > 2 * self.mean  # the tail on the left is the precise one
        ends = [(end - self.mean) / self.std for end in (self.low, self.high)]
        low, high = sorted(-end if mirrored else end for end in ends)
        first, last = torch.special.ndtr(torch.tensor([low, high], dtype=torch.float64)).tolist()
        found = torch.special.ndtri(
            torch.from_numpy(bits.astype(np.float64)).add_(0.5).mul_(2.0**-32 * (last - first)).add_(first)
        )
        scaled = found.mul_(-self.std if mirrored else self.std).add_(self.mean)
        inside: Tensor = scaled.clamp_(self.low, self.high).float()
        return inside


Distribution = Constant | Uniform | Normal | TruncatedNormal
Box = Sequence[tuple[int, int]]  # (start, stop) along each dim


@torch.no_grad()
def draw(distribution: Distribution, key: str, into: Tensor, shape: Sequence[int], box: Box) -> None:
    """Fill *into*, which has the sizes of *box*, with that box of a tensor of *shape* that is drawn under *key*."""
    if isinstance(distribution, Constant):
        into.fill_(distribution.value)
        return
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    number = int.from_bytes(digest, "little")
    for place, start, count in runs(shape, box):
        part, first = into[place].view(-1), 0
        while first < count:
            begin = start + first
            lead = begin % _BLOCK
            most = min(count - first, _MOST - lead)
            values = distribution.of(_bits(number, begin - lead, lead + most))
            part[first : first + most] = values[lead : lead + most]
            first += most


def _float(bits: Bits) -> Tensor:
    return torch.from_numpy(bits.astype(np.float32))


def _bits(key: int, start: int, count: int) -> Bits:
    """Return 32 random bits for each of at least *count* elements from *start* on, in whole blocks."""
    padded = -(-count // _BLOCK) * _BLOCK
    generator = np.random.Philox(key=key, counter=start // 8)  # a step of the counter makes four 64-bit numbers
    raw = generator.random_raw(padded // 2)
    return raw.astype("<u8", copy=False).view("<u4")


def runs(shape: Sequence[int], box: Box) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """Yield the runs of consecutive elements of *box* in a tensor of *shape*.

    Each is the leading indices of the run within the box, the flat index in the whole tensor of its first element, and
    how many elements it has.
    """
    if any(start >= stop for start, stop in box):
        return
    split = max((dim for dim, size in enumerate(shape) if box[dim] != (0, size)), default=0)
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    count = math.prod(stop - start for start, stop in box[split:])
    first = sum(start * stride for (start, _), stride in zip(box, strides, strict=True))
    for place in np.ndindex(*(stop - start for start, stop in box[:split])):
        yield place, first + sum(index * stride for index, stride in zip(place, strides, strict=False)), count
