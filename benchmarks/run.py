"""Measure nemo_dist against its peers and print the ratios: ``python benchmarks/run.py [NAME ...] [--json FILE]``.

Every module ``bench_NAME.py`` beside this one is a benchmark: a ``TITLE`` and ``measure()``, which yields figures. Ours
and the peer are always taken in turn in the same run, so the ratios hold on a busy machine too; the times do not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from figures import Figure, quartiles
from rich.console import Console
from rich.table import Table

NAMES = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))


def main() -> None:
    """Run the benchmarks that were asked for, all by default."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which to run: {', '.join(NAMES)} (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample there too")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in NAMES]
    if unknown:
        parser.error(f"there is no benchmark {', '.join(map(repr, unknown))} (there are: {', '.join(NAMES)})")
    report = {"machine": machine(), "benchmarks": {name: run(name) for name in options.names or NAMES}}
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def machine() -> dict[str, Any]:
    """Return where and with what this runs, for the record."""
    packages = {name: version(name) for name in ("nemo-dist", "torch", "transformers")}
    return {"date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count(), "python": platform.python_version(), **packages}


def run(name: str) -> dict[str, Any]:
    """Run benchmark *name*, print its table and return its record."""
    console = Console(width=None if Console().is_terminal else 140)
    started, load = time.monotonic(), os.getloadavg()[0]
    module = import_module(f"bench_{name}")
    with console.status(f"{name} ..."):
        figures = list(module.measure())
    seconds, load_after = time.monotonic() - started, os.getloadavg()[0]
    console.print(table(module.TITLE, figures))
    console.print(f"{name}: {seconds:.0f} s, load average {load:.1f} before and {load_after:.1f} after\n", style="dim")
    return {"seconds": seconds, "load_average": [load, load_after], "figures": [figure.record() for figure in figures]}


def table(title: str, figures: list[Figure]) -> Table:
    """Return the table of *figures*: medians, the median ratio of the pairs and its quartiles."""
    made = Table(title=title, title_justify="left")
    for heading in ("what", "ours", "peer", "against", "ratio", "quartiles", "limit"):
        made.add_column(heading, justify="left" if heading in ("what", "against") else "right")
    for figure in figures:
        low, high = quartiles(figure.ratios or figure.ours)
        verdict = "" if figure.met is None else f"{figure.limit:g} {'met' if figure.met else 'MISSED'}"
        made.add_row(
            figure.what,
            f"{median(figure.ours):.3g} {figure.unit}",
            f"{median(figure.peer):.3g} {figure.unit}" if figure.peer else "",
            figure.against,
            number(median(figure.ratios)) if figure.peer else "",
            f"{number(low)} .. {number(high)}",
            verdict,
        )
    return made


def number(value: float) -> str:
    """Return *value* with three decimals, or with two digits where these would show nothing."""
    return f"{value:.3f}" if value >= 0.1 else f"{value:.2g}"


if __name__ == "__main__":
    main()
