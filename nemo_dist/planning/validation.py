"""Checks and types that the value classes share: integers, frozen mappings and near matches for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import attrs

V = TypeVar("V")


def integer(name: str, value: object, low: int = 1, high: int | None = None) -> int:
    """Return *value*, the int called *name*; raise TypeError for another type, ValueError outside *low* to *high*.

    A bool is refused although Python calls it an int: ``tp_size=True`` is a mistake, not a size of 1.
    """
    bounds = f"from {low} up" if high is None else f"from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int {bounds} (got {value!r} of type {type(value).__name__})")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be an int {bounds} (got {value})")
    return value


def near(word: str, words: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for the closest of *words* to *word*, or an empty string."""
    close = difflib.get_close_matches(word, list(words), 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _copy(items: Mapping[str, V]) -> dict[str, V]:
    if not isinstance(items, Mapping):
        raise TypeError(f"expected a mapping from names (got {items!r} of type {type(items).__name__})")
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
