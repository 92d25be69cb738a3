"""Read, write and check the actions of a schedule as text, one line per rank; no torch.

An action is what torch's pipelining prints: ``2F0`` is the forward of microbatch 0 through stage 2; ``B`` a whole
backward, ``I`` its part for the inputs, ``W`` its part for the weights. ``(1F4;2B1)OVERLAP_F_B`` is two at once.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import attrs

_ONE = re.compile(r"(\d+)([FBIW])(\d+)")
_PAIR = re.compile(r"\((.*)\)OVERLAP_F_B")
_COMMUNICATION = re.compile(r"\d+(UNSHARD|RESHARD|REDUCE_GRAD|SEND_F|RECV_F|SEND_B|RECV_B)\d*")


@attrs.frozen(order=True)
class Action:
    """One piece of work: ``kind`` is F, B, I or W (see the module)."""

    stage: int
    kind: str
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


Order = tuple[tuple[Action, ...], ...]  # for every pipeline rank, what it does, in its order


def parse(text: str) -> tuple[Action, ...]:
    """Return the actions in a cell, none for an empty one or for communication; raise ValueError for other text."""
    cell = text.strip()
    if pair := _PAIR.fullmatch(cell):
        return tuple(action for part in pair[1].split(";") for action in parse(part))
    if found := _ONE.fullmatch(cell):
        return (Action(int(found[1]), found[2], int(found[3])),)
    if cell and not _COMMUNICATION.fullmatch(cell):
        raise ValueError(f"{cell!r} is no action; write a stage, one of F, B, I or W, and a microbatch, as in '2F0'")
    return ()


def order_of(lines: Iterable[Iterable[object]]) -> Order:
    """Return the order of work in *lines*, one per rank, of cells that print as actions; None is an empty cell."""
    return tuple(tuple(action for cell in line if cell is not None for action in parse(str(cell))) for line in lines)


def read(path: str) -> tuple[Order, list[str]]:
    """Return the order in the CSV file at *path* and what is wrong in it, a sentence with the line for each."""
    try:
        lines = list(csv.reader(Path(path).read_text().splitlines()))
    except (OSError, UnicodeDecodeError) as error:
        return (), [f"cannot read pp_schedule_csv {path!r}: {error}"]
    while lines and not any(cell.strip() for cell in lines[-1]):
        lines.pop()
    problems: list[str] = []
    ranks: list[tuple[Action, ...]] = []
    for number, line in enumerate(lines, 1):
        actions: list[Action] = []
        for column, cell in enumerate(line, 1):
            where = f"pp_schedule_csv {path!r}, line {number}, cell {column}"
            if _COMMUNICATION.fullmatch(cell.strip()):
                problems.append(f"{where}: {cell.strip()!r} is communication, which is added by itself; leave it out")
                continue
            try:
                actions += parse(cell)
            except ValueError as error:
                problems.append(f"{where}: {error}")
        ranks.append(tuple(actions))
    return tuple(ranks), problems


def problems_of(order: Order) -> list[str]:
    """Say what is wrong with *order*, one sentence with the line (rank 0 is line 1) each; deadlocks are not checked."""
    if not any(order):
        return ["it has no action; write one line per rank"]
    owner: dict[int, int] = {}
    problems = []
    for number, actions in enumerate(order, 1):
        for stage in dict.fromkeys(action.stage for action in actions):
            if owner.setdefault(stage, number) != number:
                problems.append(f"line {number}: stage {stage} is on line {owner[stage]} already; it lives on one rank")
    stages, microbatches = _size(order)
    problems += [f"stage {stage} is on no line" for stage in range(stages) if stage not in owner]
    for number, actions in enumerate(order, 1):
        problems += [f"line {number}: {problem}" for problem in _line_problems(actions, microbatches)]
    return problems


def _size(order: Order) -> tuple[int, int]:
    """Return the numbers of stages and microbatches."""
    actions = [action for line in order for action in line]
    return 1 + max(action.stage for action in actions), 1 + max(action.microbatch for action in actions)


def _line_problems(actions: Sequence[Action], microbatches: int) -> list[str]:
    """Check that every stage of one line runs every microbatch once, each forward before its backward."""
    counts = Counter(actions)
    place = {action: index for index, action in reversed(list(enumerate(actions)))}
    problems = [f"{action} is there {count} times" for action, count in counts.items() if count > 1]
    for stage in dict.fromkeys(action.stage for action in actions):
        for microbatch in range(microbatches):
            forward, whole, inputs, weights = (Action(stage, kind, microbatch) for kind in "FBIW")
            backward = whole if whole in place else inputs
            if forward not in place:
                problems.append(f"{forward} is missing")
            elif whole in place and (inputs in place or weights in place):
                problems.append(f"{whole} is there and so is one of {inputs} and {weights}; take one or the other")
            elif whole not in place and (inputs not in place or weights not in place):
                problems.append(f"{whole} is missing, and {inputs} with {weights} do not stand for it")
            elif place[backward] < place[forward]:
                problems.append(f"{backward} comes before {forward}")
            elif whole not in place and place[weights] < place[inputs]:
                problems.append(f"{weights} comes before {inputs}")
    return problems
