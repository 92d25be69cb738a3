"""Sweep the matrix of families: every family of transformers under every kind of parallelism, on two ranks.

``python -m nemo_dist.testing.families`` runs the cells that ``docs/models.json`` has no result for, writes every result
there as it comes, so that a sweep goes on where it stopped, and makes ``docs/models.md`` of it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any, Final

import attrs

import nemo_dist
from nemo_dist.testing.failure_report import RankFailure
from nemo_dist.testing.family_cells import CELLS, LOADERS, Verdict, judge, merged, prepare
from nemo_dist.testing.family_names import families
from nemo_dist.testing.family_page import FAILED, page
from nemo_dist.testing.pool import RankPool
from nemo_dist.testing.temp_folders import scratch

ROOT: Final = Path(nemo_dist.__file__).parent.parent
RESULTS: Final = ROOT / "docs" / "models.json"
PAGE: Final = ROOT / "docs" / "models.md"
_LIMIT = 120.0  # seconds for a cell, also on cores that others use


@attrs.define
class Results:
    """What is known: for each loader and family, why it could not be made tiny, or the verdict of each cell."""

    path: Path
    families: dict[str, dict[str, Any]] = attrs.field(factory=dict)

    @classmethod
    def read(cls, path: Path = RESULTS) -> Results:
        """Return the results in the file *path*, none if there is no such file."""
        return cls(path, json.loads(path.read_text())["families"] if path.exists() else {})

    def write(self) -> None:
        """Write the file anew, one line for each family."""
        lines = ",\n".join(f"{json.dumps(n)}: {json.dumps(self.families[n])}" for n in sorted(self.families))
        text = f'{{"transformers": "{version("transformers")}", "families": {{\n{lines}\n}}}}\n'
        new = self.path.with_suffix(".new")
        new.write_text(text)
        new.replace(self.path)

    def of(self, kind: str, family: str) -> dict[str, Any]:
        """Return the entry of *family* for the loader of *kind*, which may be changed."""
        entry: dict[str, Any] = self.families.setdefault(f"{kind} {family}", {"made": None, "cells": {}})
        return entry


def digest_of_code() -> str:
    """Return a digest of all code that a cell runs, without tests and testing tools, and of torch and transformers."""
    found = hashlib.sha1(f"{version('torch')} {version('transformers')}".encode())
    for path in sorted([*(ROOT / "nemo_dist").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]):
        if "testing" not in path.parts:
            found.update(path.read_bytes())
    return found.hexdigest()[:8]


def missing(entry: dict[str, Any], cells: Sequence[str], again: str, digest: str) -> list[str]:
    """Return those of *cells* that *entry* has no result for, or whose result *again* asks to replace."""
    stale: Callable[[dict[str, Any]], bool] = {
        "never": lambda cell: False,
        "failed": lambda cell: cell["status"] in FAILED,
        "stale": lambda cell: cell["digest"] != digest,
        "all": lambda cell: True,
    }[again]
    if entry["made"] and again in ("never", "failed"):  # it could not be made
        return []
    return [name for name in cells if name not in entry["cells"] or stale(entry["cells"][name])]


def run_family(
    pool: RankPool, kind: str, family: str, cells: Sequence[str]
) -> tuple[str, Iterator[tuple[str, Verdict]]]:
    """Return why *family* cannot be made, or an empty string, and an iterator that runs the *cells*."""
    folder = scratch("family")
    try:
        with redirect_stdout(StringIO()):  # what the ranks print
            why: str = pool.run(prepare, family, kind, folder, ranks=[0], timeout=_LIMIT)[0]
    except RankFailure as error:
        why = f"plain transformers: {_last_line(error)}"
    return why, iter(()) if why else _verdicts(pool, folder, cells)


def _verdicts(pool: RankPool, folder: Path, cells: Sequence[str]) -> Iterator[tuple[str, Verdict]]:
    for cell in cells:
        try:
            with redirect_stdout(StringIO()):
                verdict = merged(pool.run(judge, cell, folder, timeout=_LIMIT))
        except RankFailure as error:  # a rank died, or hangs: the pool starts new ones
            verdict = Verdict(status="crash", reason=_last_line(error))
        if verdict.status in FAILED:  # a rank that failed alone leaves the others in the middle of an exchange
            pool.close()
        yield cell, verdict
    shutil.rmtree(folder, ignore_errors=True)


def _last_line(error: RankFailure) -> str:
    return " ".join(str(error).splitlines()[0].split())[:400]


def sweep(results: Results, arguments: argparse.Namespace) -> int:
    """Run what *arguments* ask for and is not known; return the number of cells that failed."""
    digest, failures, start = digest_of_code(), 0, time.monotonic()
    with RankPool(2, timeout=_LIMIT, collective_timeout=_LIMIT / 2) as pool:
        for kind in arguments.loaders:
            for family in families(kind):
                entry = results.of(kind, family)
                cells = missing(entry, arguments.cells, arguments.again, digest)
                if not cells or (arguments.families and family not in arguments.families):
                    continue
                if time.monotonic() - start > 60 * arguments.minutes:
                    print("time is up; the same command goes on from here")
                    return failures
                entry["made"], verdicts = run_family(pool, kind, family, cells)
                for cell, verdict in verdicts:
                    kept = {"status": verdict.status, "reason": verdict.reason, "digest": digest}
                    entry["cells"][cell] = {name: value for name, value in kept.items() if value}
                    failures += verdict.status in FAILED
                    if verdict.status in FAILED:
                        print(f"{kind} {family}, {cell}: {verdict.status}: {verdict.reason}", flush=True)
                print(
                    f"{time.monotonic() - start:5.0f} s  {kind} {family}  {entry['made'] or _short(entry)}", flush=True
                )
                results.write()
    return failures


def _short(entry: dict[str, Any]) -> str:
    return ", ".join(f"{cell} {found['status']}" for cell, found in entry["cells"].items())


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m nemo_dist.testing.families", description=__doc__)
    words: dict[str, Any] = {"type": lambda text: text.split(",")}
    parser.add_argument("--loaders", default=list(LOADERS), help=f"of {','.join(LOADERS)}; all by default", **words)
    parser.add_argument("--families", default=[], help="model types, with commas; all by default", **words)
    parser.add_argument("--cells", default=list(CELLS), help=f"of {','.join(CELLS)}; all by default", **words)
    parser.add_argument(
        "--again",
        choices=("never", "failed", "stale", "all"),
        default="never",
        help="run again what failed, what other code computed, or all; by default only what has no result",
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no family after so many minutes")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file of the results")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """Run the command; return 1 if a cell failed."""
    arguments = _arguments(given)
    results = Results.read(arguments.results)
    for kind in LOADERS:
        for family in families(kind):
            results.of(kind, family)
    failures = sweep(results, arguments)
    results.write()
    if arguments.results == RESULTS:
        PAGE.write_text(page(results.families))
    print(f"{failures} cells failed")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
