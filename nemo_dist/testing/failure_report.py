"""The error of a pool whose ranks fail, die or hang: the root cause first, then one line for each other rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from nemo_dist.errors import RankError
from nemo_dist.mesh.lost_peer import lost_a_peer
from nemo_dist.testing.remote_call import Reply

_LONGEST = 4000  # characters of a rank's output


class RankFailure(RankError):
    """A call failed on some ranks; ``failures`` maps each to its traceback or stacks, the root cause first."""

    def __init__(self, message: str, failures: dict[int, str]) -> None:
        self.failures = failures
        super().__init__(message)


def failure(failed: Mapping[int, Reply], hanging: Sequence[int], what: str, outputs: Mapping[int, Path]) -> RankFailure:
    """Return the error for *what* that raised, or whose process died, on ranks *failed*, while *hanging* still ran."""
    order = sorted(failed, key=lambda rank: (lost_a_peer(failed[rank].error), failed[rank].at))
    first, others = order[0], order[1:]
    lines = [f"rank {first} of {len(outputs)} failed in {what}", "", failed[first].failure.rstrip()]
    if others:
        lines += ["", "then failed:"]
        lines += [f"  rank {rank}: {failed[rank].error.splitlines()[-1]}" for rank in others]
    if hanging:
        lines += ["", f"still running when the pool stopped: {_names(hanging)}"]
    lines += output({first: outputs[first]})
    return RankFailure("\n".join(lines), {rank: failed[rank].failure for rank in order})


def hang(stacks: Mapping[int, str], limit: float, what: str, outputs: Mapping[int, Path]) -> RankFailure:
    """Return the error for ranks that did not return from *what* within *limit* seconds; *stacks* are theirs."""
    hanging = sorted(stacks)
    lines = [f"{_names(hanging)} of {len(outputs)} did not return from {what} within {limit:g} s"]
    for rank in hanging:
        lines += ["", f"stacks of rank {rank}:", stacks[rank].rstrip()]
    lines += output({rank: outputs[rank] for rank in hanging})
    return RankFailure("\n".join(lines), dict(stacks))


def output(outputs: Mapping[int, Path]) -> list[str]:
    """Return the last output of each rank, as lines; nothing for a rank without output."""
    lines: list[str] = []
    for rank, path in outputs.items():
        if text := read(path).rstrip():
            lines += ["", f"output of rank {rank}:", text[-_LONGEST:]]
    return lines


def read(path: Path) -> str:
    """Return the text of *path*, empty when it is not there."""
    return path.read_text(errors="replace") if path.exists() else ""


def _names(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
