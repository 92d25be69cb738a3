"""What is counted of one kind of fault."""

from __future__ import annotations

from collections import Counter

import attrs


@attrs.define
class Tally:
    """How often a fault was tried, and how it ended.

    ``survived``: the run went on as if nothing had happened, or resumed from a whole checkpoint. ``refused``: one of
    the documented errors, and nothing of the run or its files was changed. ``lost`` says what was wrong otherwise.
    ``notes`` are counts of what is worth knowing, ``remark`` is the rest of it.
    """

    name: str
    tried: int = 0
    survived: int = 0
    refused: int = 0
    lost: list[str] = attrs.field(factory=list)
    notes: Counter[str] = attrs.field(factory=Counter)
    remark: str = ""

    def survive(self, note: str = "") -> None:
        """Count one that was survived."""
        self.tried += 1
        self.survived += 1
        self.notes[note] += bool(note)

    def refuse(self, note: str = "") -> None:
        """Count one that was refused."""
        self.tried += 1
        self.refused += 1
        self.notes[note] += bool(note)

    def lose(self, what: str) -> None:
        """Count one in which something was lost, or raised what is not documented."""
        self.tried += 1
        self.lost.append(what)

    def __str__(self) -> str:
        said = self.remark or ", ".join(f"{note}: {count}" for note, count in sorted(self.notes.items()) if count)
        end = f"LOST {len(self.lost)}" if self.lost else "nothing lost"
        counts = f"{self.tried:5} tried {self.survived:5} survived {self.refused:5} refused"
        return f"{self.name:44} {counts}   {end}" + (f"   ({said})" if said else "")
