"""Gather small values through the store of the process group; rank 0 computes one result and all read it.

No collective runs, so this works when a rank has failed or is about to run other collectives: a disagreement becomes an
error that names the ranks instead of a hang. Each rank writes its value, waits for the result and reads it; rank 0 also
waits for the values of all ranks, reads them and writes the result.
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
import torch.distributed as dist

from nemo_dist.errors import RankError
from nemo_dist.mesh.rank_status import all_there, arrive, default_store, watch

_YEAR = 60 * 24 * 365  # in minutes
_BRIEF = 60  # characters of a value in an error
# How often each occasion was used: part of its keys in the store, equal on all ranks, as they call in the same order.
_held: defaultdict[str, int] = defaultdict(int)


@attrs.define(eq=False)
class _Meetings:
    patience: timedelta = timedelta(minutes=30)  # the slowest disk may be much slower than the fastest


_meetings = _Meetings()


def set_patience(minutes: float) -> None:
    """Set how long a rank waits for the slowest one at every meeting: to build, load, save and export."""
    if isinstance(minutes, bool) or not isinstance(minutes, int | float) or not 0 < minutes <= _YEAR:
        raise ValueError(f"patience_minutes must be a positive number of minutes, at most a year (got {minutes!r})")
    _meetings.patience = timedelta(minutes=minutes)


def consensus(
    occasion: str,
    mine: Any,
    decide: Callable[[list[Any]], Any],
    ranks: Sequence[int] | None = None,
    store: dist.Store | None = None,
    here: int | None = None,
) -> Any:
    """Gather *mine* of all *ranks* (None: all) through the store and return ``decide(values)`` on every rank.

    Values and result are JSON; *decide* gets the values in the order of *ranks* and runs on the first of them only.
    ``occasion`` names the exchange in errors. A background thread must pass ``ranks``, its own ``store`` (a clone, as
    threads do not share a connection) and ``here``, the rank of this process: nothing then depends on the process
    group, which may be gone. Raises RankError on every rank that takes part when a rank does not arrive in time
    (``set_patience``) or has failed before; the message names these.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    members = list(range(world) if ranks is None else ranks)
    if len(members) == 1:
        return decide([mine])
    background = store is not None
    if not background and not dist.is_initialized():
        raise RankError(
            f"the process group is destroyed, so ranks {members} cannot meet for {occasion!r}; do that before "
            "destroy_process_group()"
        )
    store = store or default_store()
    name = occasion if ranks is None else f"{occasion} of {len(members)} ranks, {zlib.crc32(repr(members).encode())}"
    _held[name] += 1
    prefix = f"nemo_dist/{name}/{_held[name]}"
    rank = dist.get_rank() if here is None else here
    try:
        if not background:
            arrive(store, rank, members, occasion, f"{prefix}/result")
        # One rank looks for all, the others for that one. A background thread meets the others whatever they train.
        awaited = members if rank == members[0] else members[:1]
        look = watch(store, members, occasion, awaited, "" if background else prefix)
        result = meet(store, prefix, members, rank, mine, decide, look)
        if background:
            _keep_until_read(store, prefix, members, rank)
    except dist.DistNetworkError as error:
        raise RankError(
            f"rank {rank} lost the store of the process group at {occasion!r} ({str(error).splitlines()[0]}): rank 0, "
            "or the launcher that held it, has ended; look at its log"
        ) from error
    if result is None:
        raise RankError(
            f"rank {rank} waited {2 * _meetings.patience} for rank {members[0]} at {occasion!r}, and it did not come"
        )
    if "failed" in result:
        raise RankError(result["failed"])
    if "missing" in result:
        raise RankError(
            f"ranks {result['missing']} did not come to {occasion!r} within {_meetings.patience}; look at their logs "
            "first"
        )
    return result["result"]


def meet(
    store: dist.Store,
    prefix: str,
    members: list[int],
    rank: int,
    mine: Any,
    decide: Callable[[list[Any]], Any],
    look: Callable[[], None],
) -> Any:
    """Write what is *mine*, and return what the first rank makes of it; None when that does not come in time."""
    store.set(f"{prefix}/{rank}", json.dumps(mine))
    if rank == members[0]:
        _publish(store, prefix, members, decide, look)
    # The first rank waits for the others, and then has to say who is missing.
    there = all_there(store, [f"{prefix}/result"], 2 * _meetings.patience, look)
    return json.loads(store.get(f"{prefix}/result")) if there else None


def _publish(
    store: dist.Store,
    prefix: str,
    members: list[int],
    decide: Callable[[list[Any]], Any],
    look: Callable[[], None],
) -> None:
    keys = {rank: f"{prefix}/{rank}" for rank in members}
    result: dict[str, Any]
    try:
        if all_there(store, list(keys.values()), _meetings.patience, look):
            result = {"result": decide([json.loads(value) for value in store.multi_get(list(keys.values()))])}
        else:
            result = {"missing": [rank for rank, key in keys.items() if not store.check([key])]}
    except RankError as error:
        result = {"failed": str(error)}
    store.set(f"{prefix}/result", json.dumps(result))


def _keep_until_read(store: dist.Store, prefix: str, members: list[int], rank: int) -> None:
    """Have the first rank wait until the others have read the result: its process may hold the store, and end next."""
    store.set(f"{prefix}/{rank}/read", "")
    if rank == members[0]:
        keys = [f"{prefix}/{member}/read" for member in members]
        with suppress(RankError):  # a rank that has failed reads nothing
            all_there(store, keys, _meetings.patience, watch(store, members, "reading the result", members))


def compare(occasion: str, fields: Mapping[str, str], ranks: Sequence[int] | None = None) -> None:
    """Raise RankError on every rank when *fields* differ between ranks; the message lists each field and the ranks."""
    _refuse(occasion, consensus(occasion, dict(fields), differences, ranks))


def brief(value: Any) -> str:
    """Return *value* as text for ``compare``: JSON, or the start of a long one and its checksum."""
    text = json.dumps(value, sort_keys=True, default=lambda other: type(other).__name__)
    return text if len(text) <= _BRIEF else f"{text[:_BRIEF]}... ({zlib.crc32(text.encode()):08x})"


def refuse_differences(occasion: str, answers: Sequence[Mapping[str, str]]) -> None:
    """Raise RankError as ``compare`` does, where the fields of all ranks, *answers*, are known already."""
    _refuse(occasion, differences(answers))


def _refuse(occasion: str, differing: Sequence[str]) -> None:
    if differing:
        raise RankError(f"the ranks disagree about {occasion}:\n" + "\n".join(f"- {line}" for line in differing))


def differences(answers: Sequence[Mapping[str, str]]) -> list[str]:
    """Return one line per field and differing value: which ranks have it, and the value that most ranks have."""
    lines = []
    for name in sorted({name for answer in answers for name in answer}):
        values = [answer.get(name, "(absent)") for answer in answers]
        usual = Counter(values).most_common(1)[0][0]
        others: dict[str, list[int]] = {}
        for rank, value in enumerate(values):
            if value != usual:
                others.setdefault(value, []).append(rank)
        lines += [
            f"{name} is {value} on rank {', '.join(map(str, ranks))}, but {usual} on the others"
            for value, ranks in others.items()
        ]
    return lines


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
    rank = here if here is not None else dist.get_rank() if dist.is_initialized() else 0
    error = "" if failure is None else f"{type(failure).__name__}: {failure}"
    failed, values = consensus(occasion, [rank, error, value], _failed_or_values, ranks, store, here)
    if failure is not None:
        raise failure
    if failed:
        lines = "\n".join(f"- rank {rank}: {text}" for rank, text in failed)
        raise RankError(f"{occasion} failed on {len(failed)} of the ranks:\n{lines}")
    return list(values)


def _failed_or_values(answers: Sequence[Sequence[Any]]) -> list[Any]:
    failed = [[rank, error] for rank, error, _ in answers if error]
    values = [value for _, _, value in answers]
    return [failed, [] if failed or all(value is None for value in values) else values]
