"""Checks and types that the value classes share: integers, frozen mappings, and words for error messages."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import attrs

V = TypeVar("V")

YEAR = 60 * 24 * 365  # in minutes
LARGEST_SEED = 2**63 - 1  # that torch takes
MOST_RANKS = 2**20  # more than any machine has; what is planned rank by rank stays short
_MOST_BITS = 63  # of a number that torch can count
_LONGEST = 200  # characters of a value in a message
_LONGEST_NAME = 100  # characters of a word for which a near match is looked for


class _Short(reprlib.Repr):
    """Writes a value with at most a few items on few levels, whatever it contains."""

    def repr_FrozenMapping(self, value: FrozenMapping[Any], level: int) -> str:  # found by class name
        return self.repr_dict(dict(value), level)

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 80, 160
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdeque = self.maxdict = 8


def shown(value: object) -> str:
    """Return ``repr(value)``, shortened to some 200 characters, for a message about what a user gave.

    Takes bounded time also for a value that contains itself, or one part a billion times.
    """
    try:
        text = _Short().repr(value)
    except Exception:  # the value's own repr, or an int too long to write
        text = f"<{type(value).__name__}>"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def same(one: object, other: object) -> bool:
    """Whether two values are equal; False for what cannot be compared, or compares to more than one answer."""
    try:
        return bool(one == other)
    except Exception:  # whatever the value's own comparison raises
        return False


def integer(name: str, value: object, low: int = 1, high: int | None = None) -> int:
    """Return *value*, the int called *name*; raise TypeError for another type, ValueError outside *low* to *high*.

    A bool is refused although Python calls it an int: ``tp_size=True`` is a mistake, not a size of 1. So is what torch
    could not count, 2**63 and more, which Python may refuse even to write into a message.
    """
    bounds = f"from {low} up" if high is None else f"from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int {bounds} (got {shown(value)} of type {type(value).__name__})")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be an int {bounds} (got {shown(value)})")
    if high is None and value.bit_length() > _MOST_BITS:
        raise ValueError(f"{name} must be an int {bounds}, and less than 2**{_MOST_BITS} (got {shown(value)})")
    return value


def number_of_ranks(name: str, value: object) -> int:
    """Return *value*, the number of ranks called *name*; raise as ``integer`` does, and beyond a million."""
    if isinstance(value, int) and value > MOST_RANKS:
        raise ValueError(f"{name} must be at most {MOST_RANKS} ranks (got {shown(value)})")
    return integer(name, value)


def positive_minutes(name: str, value: object) -> float:
    """Return *value*, the number of minutes called *name*; raise ValueError unless it is above 0, at most a year."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= YEAR:
        raise ValueError(f"{name} must be a positive number of minutes, at most a year (got {shown(value)})")
    return value


def whole_number(text: str, most: int) -> int | None:
    """Return the number that *text* writes in the digits 0 to 9; None for another text, and above *most*."""
    digits = text.lstrip("0") or text[:1]
    if not (text.isascii() and text.isdigit()) or len(digits) > len(str(most)):  # int() refuses thousands of digits
        return None
    return int(digits) if int(digits) <= most else None


def near(word: object, words: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for the closest of *words* to *word*, or an empty string."""
    if not isinstance(word, str) or len(word) > _LONGEST_NAME:
        return ""
    close = difflib.get_close_matches(word, list(words), 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _copy(items: Mapping[str, V]) -> dict[str, V]:
    if not isinstance(items, Mapping):
        raise TypeError(f"expected a mapping from names (got {shown(items)} of type {type(items).__name__})")
    return dict(items)


@attrs.frozen(eq=False, repr=False)
class FrozenMapping(Mapping[str, V]):
    """An immutable mapping: hashable when its values are, picklable, and equal to a dict with the same items."""

    _items: dict[str, V] = attrs.field(converter=_copy, factory=dict)

    def __getitem__(self, name: str) -> V:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._items,)
