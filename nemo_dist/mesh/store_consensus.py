"""Agree on small values through the store of the process group.

No collective runs, so this works when a rank has failed or is about to run other collectives: a disagreement becomes an
error that names the ranks instead of a hang. What a meeting costs the first rank does not grow with the number of ranks
while all say the same (``meeting``); where they do not, the first rank reads all values and writes one result.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import attrs
import torch
import torch.distributed as dist

from nemo_dist.errors import RankError
from nemo_dist.mesh.meeting import DIGEST_SIZE, Meeting, wait_until
from nemo_dist.mesh.rank_status import Watch, default_store, goes_on
from nemo_dist.planning.validation import positive_minutes

_BRIEF = 60  # characters of a value in an error
# How often each occasion was used: part of its keys in the store, equal on all ranks, as they call in the same order.
_held: defaultdict[str, int] = defaultdict(int)


@attrs.define(eq=False)
class _Meetings:
    patience: timedelta = timedelta(minutes=30)  # the slowest disk may be much slower than the fastest


_meetings = _Meetings()


@attrs.define(eq=False)
class Imagined:
    """What this rank would have sent to ranks that do not exist, in bytes of values, not of tensors."""

    sent: int = 0


imagined = Imagined()


def is_imagined() -> bool:
    """Whether the process group is torch's fake one, whose other ranks do not exist: they say what this one says."""
    return dist.is_initialized() and dist.get_backend() == dist.Backend.FAKE


def set_patience(minutes: float) -> None:
    """Set how long a rank waits for the slowest one at every meeting: to build, load, save and export."""
    _meetings.patience = timedelta(minutes=positive_minutes("patience_minutes", minutes))


def consensus(
    occasion: str,
    mine: Any,
    decide: Callable[[list[Any]], Any],
    ranks: Sequence[int] | None = None,
    store: dist.Store | None = None,
    here: int | None = None,
) -> Any:
    """Return ``decide(values)`` of the values *mine* of all *ranks* (None: all), on every rank.

    Values and result are JSON; *decide* gets the values in the order of *ranks*. Where all are equal, it runs on every
    rank, else on the first of them only. ``occasion`` names the exchange in errors. A background thread must pass
    ``ranks``, its own ``store`` (a clone, as threads do not share a connection) and ``here``, the rank of this process:
    nothing then depends on the process group, which may be gone. Raises RankError on every rank that takes part when a
    rank does not arrive in time (``set_patience``) or has failed before; the message names these.
    """
    return _held_meeting(occasion, mine, decide, ranks, store, here)[0]


def _held_meeting(
    occasion: str,
    mine: Any,
    decide: Callable[[list[Any]], Any],
    ranks: Sequence[int] | None = None,
    store: dist.Store | None = None,
    here: int | None = None,
    word: Any = None,
) -> tuple[Any, Any]:
    """Return what ``consensus`` does, and the *word* of the first rank, a JSON value that may differ between ranks."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    members = range(world) if ranks is None else ranks
    background = store is not None
    if len(members) == 1 or (not background and is_imagined()):
        imagined.sent += DIGEST_SIZE
        return decide([mine] * len(members)), word
    if not background and not dist.is_initialized():
        raise RankError(
            f"the process group is destroyed, so ranks {list(members)} cannot meet for {occasion!r}; do that before "
            "destroy_process_group()"
        )
    store = store or default_store()
    name = occasion if ranks is None else f"{occasion} of {len(members)} ranks, {zlib.crc32(repr(members).encode())}"
    _held[name] += 1
    rank = dist.get_rank() if here is None else here
    meeting = Meeting(store, f"nemo_dist/{name}/{_held[name]}", members, rank)
    # One rank looks for all, the others for that one. A background thread meets the others whatever they train.
    awaited = members if meeting.leads else members[:1]
    watch = Watch(store, members, occasion, awaited, meeting.prefix, None if background else rank)
    try:
        if not background:
            goes_on(store, rank)
        return meet(meeting, occasion, mine, decide, watch, word, must_stay=background)
    except dist.DistNetworkError as error:
        raise RankError(
            f"rank {rank} lost the store of the process group at {occasion!r} ({str(error).splitlines()[0]}): rank 0, "
            "or the launcher that held it, has ended; look at its log"
        ) from error


def meet(
    meeting: Meeting,
    occasion: str,
    mine: Any,
    decide: Callable[[list[Any]], Any],
    watch: Watch,
    word: Any = None,
    must_stay: bool = False,
) -> tuple[Any, Any]:
    """Hold *meeting*; return what *decide* makes of the values, and the *word* of the first rank.

    ``must_stay``: have the first rank wait until the others have left, as its process may hold the store, and end next.
    """
    meeting.come(mine, word)
    try:
        _wait_for_all(meeting, occasion, watch)
        if meeting.agreed():
            found = {"result": decide([meeting.mine] * len(meeting.members))}
        else:
            found = _in_full(meeting, occasion, decide, watch)
        heard = None if word is None else meeting.word()
        meeting.leave()
    finally:
        watch.go_on()
    if must_stay and meeting.leads:
        with suppress(RankError):  # a rank that has failed reads nothing
            stay = Watch(meeting.store, meeting.members, "reading the result", meeting.members)
            wait_until(meeting.left, _meetings.patience, stay.look, len(meeting.members))
    if "failed" in found:
        raise RankError(found["failed"])
    return found["result"], heard


def _wait_for_all(meeting: Meeting, occasion: str, watch: Watch) -> None:
    """Wait until all have come. The first rank says who is missing where they do not; the others wait longer."""
    patience = _meetings.patience if meeting.leads else 2 * _meetings.patience
    why = ""

    def look() -> None:
        meeting.stay()
        watch.look()

    try:
        if not wait_until(meeting.complete, patience, look, len(meeting.members)):
            first = meeting.members[0]
            why = f"rank {meeting.rank} waited {patience} for rank {first} at {occasion!r}, and it did not come"
            if meeting.leads:
                absent = meeting.absent()
                why = f"ranks {absent} did not come to {occasion!r} within {patience}; look at their logs first"
    except RankError as error:
        why = str(error)
    if why and not (meeting.leads and not meeting.give_up(why)):
        raise RankError(why)
    if meeting.given_up:
        raise RankError(meeting.result()["failed"])


def _in_full(meeting: Meeting, occasion: str, decide: Callable[[list[Any]], Any], watch: Watch) -> dict[str, Any]:
    """Return what the first rank decides when the values differ: a "result", or why it has "failed"."""
    patience, number = 2 * _meetings.patience, len(meeting.members)
    meeting.tell()
    if meeting.leads:
        try:
            if not wait_until(meeting.told, patience, watch.look, number):
                raise RankError(f"ranks that came to {occasion!r} are gone; look at their logs")
            result = {"result": decide(meeting.values())}
        except Exception as error:  # the others must not wait for what will not come
            result = {"failed": str(error) or type(error).__name__}
        meeting.decide(result)
    if not wait_until(meeting.decided, 2 * patience, watch.look, number):
        raise RankError(f"rank {meeting.members[0]}, which came to {occasion!r}, is gone; look at its log")
    return meeting.result()


def compare(occasion: str, fields: Mapping[str, str], ranks: Sequence[int] | None = None) -> None:
    """Raise RankError on every rank when *fields* differ between ranks; the message lists each field and the ranks."""
    _refuse(occasion, consensus(occasion, dict(fields), differences, ranks))


def brief(value: Any) -> str:
    """Return *value* as text for ``compare``: JSON, or the start of a long one and its checksum."""
    text = json.dumps(value, sort_keys=True, default=_named)
    return text if len(text) <= _BRIEF else f"{text[:_BRIEF]}... ({zlib.crc32(text.encode()):08x})"


def _named(value: Any) -> str:
    """Return the name of a dtype, of another object that of its type, as its own text may be another on every rank."""
    return str(value) if isinstance(value, torch.dtype) else type(value).__name__


def refuse_differences(occasion: str, answers: Sequence[Mapping[str, str]]) -> None:
    """Raise RankError as ``compare`` does, where the fields of all ranks, *answers*, are known already."""
    _refuse(occasion, differences(answers))


def refuse_unequal(
    occasion: str, shares: Sequence[tuple[Sequence[range], Mapping[str, Mapping[str, Any]]]], most: int = 5
) -> None:
    """Raise RankError where ranks that have a thing of one name give it different options; not all have all things.

    *shares*: ranks that say the same (see ``RankGroup.distinct``), and the options by name. At most *most* are listed.
    """
    lines: list[str] = []
    for name in dict.fromkeys(name for _, things in shares for name in things):
        having = [(ranks, things[name]) for ranks, things in shares if name in things]
        if any(options != having[0][1] for _, options in having):
            for key in sorted({key for _, options in having for key in options}):
                told = {rank: _text(options.get(key)) for ranks, options in having for one in ranks for rank in one}
                lines += _odd(f"{key} of {name}", told)
    _refuse(occasion, [*lines[:most], f"and {len(lines) - most} more"] if len(lines) > most else lines)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else brief(value)


def _refuse(occasion: str, differing: Sequence[str]) -> None:
    if differing:
        raise RankError(f"the ranks disagree about {occasion}:\n" + "\n".join(f"- {line}" for line in differing))


def differences(answers: Sequence[Mapping[str, str]]) -> list[str]:
    """Return one line per field and differing value: which ranks have it, and the value that most ranks have."""
    if all(answer == answers[0] for answer in answers):
        return []
    lines = []
    for name in sorted({name for answer in answers for name in answer}):
        lines += _odd(name, {rank: answer.get(name, "(absent)") for rank, answer in enumerate(answers)})
    return lines


def _odd(name: str, values: Mapping[int, str]) -> list[str]:
    """Return a line for every value of the field *name*, by rank, that is not the usual one."""
    usual = Counter(values.values()).most_common(1)[0][0]
    others: dict[str, list[int]] = {}
    for rank, value in values.items():
        if value != usual:
            others.setdefault(value, []).append(rank)
    return [
        f"{name} is {value} on rank {', '.join(map(str, ranks))}, but {usual} on the others"
        for value, ranks in others.items()
    ]


def report(occasion: str, failure: BaseException | None, ranks: Sequence[int] | None = None) -> None:
    """Raise on all *ranks* when one has a *failure*: that rank raises it, the others a RankError that quotes it."""
    share(occasion, None, failure, ranks)


@contextmanager
def reported(occasion: str, ranks: Sequence[int] | None = None) -> Iterator[None]:
    """Run the with-block on all *ranks*; when it raises on one, raise on all as :func:`report` does."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    report(occasion, failure, ranks)


def share(
    occasion: str,
    value: Any,
    failure: BaseException | None,
    ranks: Sequence[int] | None = None,
    store: dist.Store | None = None,
    here: int | None = None,
) -> list[Any]:
    """Return the *value* of every rank, in the order of *ranks*; when any rank has a *failure*, raise on all.

    Values are JSON; where all are None the result is an empty list. Arguments as for :func:`consensus`, errors as for
    :func:`report`.
    """
    return share_and_hear(occasion, value, failure, ranks, store, here)[0]


def share_and_hear(
    occasion: str,
    value: Any,
    failure: BaseException | None,
    ranks: Sequence[int] | None = None,
    store: dist.Store | None = None,
    here: int | None = None,
    word: Any = None,
) -> tuple[list[Any], Any]:
    """Return what ``share`` does, and the *word* of the first of *ranks*; the words, JSON values, may differ."""
    return decide_and_hear(occasion, value, failure, _unless_none, ranks, store, here, word)


def decide_and_hear(
    occasion: str,
    value: Any,
    failure: BaseException | None,
    decide: Callable[[list[Any]], Any],
    ranks: Sequence[int] | None = None,
    store: dist.Store | None = None,
    here: int | None = None,
    word: Any = None,
) -> tuple[Any, Any]:
    """Return ``decide(values)`` as ``consensus`` does, and the *word*; when any rank has a *failure*, raise on all.

    Where a rank has failed, *decide* is not called. Arguments and errors as for ``share_and_hear``.
    """

    def judged(answers: list[Any]) -> list[Any]:
        if not answers[0][0] and answers.count(answers[0]) == len(answers):  # nothing is made for each of many ranks
            return [[], decide([answers[0][1]] * len(answers))]
        failed = [[index, error] for index, (error, _) in enumerate(answers) if error]
        return [failed, None if failed else decide([value for _, value in answers])]

    error = "" if failure is None else f"{type(failure).__name__}: {failure}"
    (failed, decided), heard = _held_meeting(occasion, [error, value], judged, ranks, store, here, word)
    if failure is not None:
        raise failure
    if failed:
        lines = "\n".join(f"- rank {ranks[index] if ranks else index}: {text}" for index, text in failed)
        raise RankError(f"{occasion} failed on {len(failed)} of the ranks:\n{lines}")
    return decided, heard


def _unless_none(values: list[Any]) -> list[Any]:
    return [] if values.count(None) == len(values) else values
