"""Readable names for the cases of a parametrised test, such as "llama-tied, 4 ranks, cp 2, selective"."""

from collections.abc import Mapping

import pytest


def case_id(*parts):
    """Return the name of a case: a number is one of ranks, a mapping gives sizes or options, what is falsy is left out.

    Of sizes, those of 1 or None are left out too.
    """
    return ", ".join(word for part in parts if part for word in _words(part))


def _words(part):
    if isinstance(part, Mapping):
        given = {name.removesuffix("_size"): value for name, value in part.items() if value is not None}
        return [name if value is True else f"{name} {value}" for name, value in given.items() if repr(value) != "1"]
    if isinstance(part, int) and not isinstance(part, bool):
        return [f"{part} rank{'s' * (part > 1)}"]
    return [str(part)]


def cases(names, rows, name=case_id):
    """Parametrise a test: a row has the values of *names*, in a ``pytest.param`` where it has marks."""
    given = [row if hasattr(row, "marks") else pytest.param(*row) for row in rows]
    named = [pytest.param(*row.values, marks=row.marks, id=name(*row.values)) for row in given]
    return pytest.mark.parametrize(names, named)


def crossed(first, second, every=3):
    """Return each of *first* with each of *second* (tuples); one in *every* by default, the rest in ``make matrix``.

    With lengths that *every* does not divide, each value of both is still in the default run.
    """
    rows = [(one, *other) for one in first for other in second]
    return [row if index % every == 0 else slow(*row) for index, row in enumerate(rows)]


def slow(*values):
    """Leave the case of these *values* to ``make matrix``."""
    return pytest.param(*values, marks=pytest.mark.slow)
