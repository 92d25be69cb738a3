"""Make the page of the docs that says which family trains under which kind of parallelism."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, Final

from nemo_dist.testing.family_cells import CELLS, LOADERS

FAILED: Final = ("wrong", "crash", "late refusal")
_TITLES = {
    "causal": "Causal language models",
    "sequence": "Sequence classification",
    "token": "Token classification",
    "image-text": "Image-text models",
}
_INTRO = """# Which model trains how

Every family of transformers {version}, made tiny, on two ranks, compared with one process in float32: loss, every
gradient by name, clipped norm, the weights after two AdamW steps, and the exported files. Rows are padded, labels
uneven, biases and norms random. `bfloat16` is the default precision of `fsdp2`, held to what plain bfloat16 loses.
Image-text models are given text only. Made by `make models`; do not edit.

`=` equal; a number: refused, with the reason of that number below; **bold**: a fault. Empty: not run. `tp + sp` cuts
the sequence between blocks; `recompute` is activation checkpointing under `fsdp2`.
"""


def page(families: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the page in Markdown, from the results by loader and family."""
    numbers: dict[str, int] = {}
    examples: dict[str, str] = {}
    bodies = [_table(kind, _of(kind, families), numbers, examples) for kind in LOADERS]
    reasons = [f"{number}. {examples[kind]}" for kind, number in numbers.items()]
    return "\n".join(
        [
            _INTRO.format(version=version("transformers")),
            *_counts(families),
            *(line for body in bodies for line in body),
            "## Reasons of refusals\n",
            "Each as it was given to one of the families.\n",
            *reasons,
            "",
        ]
    )


def _of(kind: str, families: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {name.split(" ")[1]: entry for name, entry in families.items() if name.split(" ")[0] == kind}


def _counts(families: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = ["## Counts\n", f"| | made tiny | {' | '.join(CELLS)} |", "|---|---|" + "---|" * len(CELLS)]
    for kind in LOADERS:
        found = _of(kind, families)
        made = [entry for entry in found.values() if entry["made"] == ""]
        cells = []
        for cell in CELLS:
            counts = Counter(entry["cells"][cell]["status"] for entry in made if cell in entry["cells"])
            failed = sum(counts[status] for status in FAILED)
            words = [f"{counts['equal']} equal", f"{counts['refused']} refused" if counts["refused"] else ""]
            words += [
                f"**{failed} failed**" if failed else "",
                f"{counts['no reference']} not in plain" * bool(counts["no reference"]),
            ]
            cells.append(", ".join(word for word in words if word) if counts else "")
        lines.append(f"| {_TITLES[kind]} | {len(made)} of {len(found)} | {' | '.join(cells)} |")
    return [*lines, ""]


def _table(
    kind: str, found: Mapping[str, Mapping[str, Any]], numbers: dict[str, int], examples: dict[str, str]
) -> list[str]:
    lines = [f"## {_TITLES[kind]}\n", f"| family | {' | '.join(CELLS)} |", "|---|" + "---|" * len(CELLS)]
    unmade = []
    for family, entry in sorted(found.items()):
        if entry["made"] != "":
            unmade.append(f"- `{family}`: {_plain(entry['made'] or 'not run')}")
            continue
        cells = [_cell(entry["cells"].get(cell), numbers, examples) for cell in CELLS]
        lines.append(f"| `{family}` | {' | '.join(cells)} |")
    return [*lines, "", *(["Could not be made tiny:\n", *unmade, ""] if unmade else [])]


def _cell(found: Mapping[str, Any] | None, numbers: dict[str, int], examples: dict[str, str]) -> str:
    if found is None:
        return ""
    if found["status"] == "equal":
        return "="
    if found["status"] in FAILED:
        return f"**{found['status']}**"
    kind = _kind(found["reason"])
    examples.setdefault(kind, _plain(found["reason"]))
    return str(numbers.setdefault(kind, len(numbers) + 1))


def _kind(reason: str) -> str:
    """Return *reason* without the names in it, so that the same sentence about two models counts as one."""
    return re.sub(r"\b\w*[A-Z_.0-9]\w*\b|'[^']*'|\([^)]*\)", "~", reason)[:60]


def _plain(reason: str) -> str:
    """Return *reason* with what Markdown would read as its own marks escaped."""
    return re.sub(r"([*_|<>`\[\]])", r"\\\1", " ".join(reason.split()))
