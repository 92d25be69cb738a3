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

import torch.distributed as dist

from nemo_dist.errors import RankError
from nemo_dist.mesh import whereabouts

_PATIENCE = timedelta(minutes=5)
# How often each occasion was used: part of its keys in the store, equal on all ranks, as they call in the same order.
_held: defaultdict[str, int] = defaultdict(int)


def consensus(
    occasion: str,
    mine: Any,
    decide: Callable[[list[Any]], Any],
    ranks: Sequence[int] | None = None,
    patience: timedelta = _PATIENCE,
    store: dist.Store | None = None,
    here: int | None = None,
) -> Any:
    """Gather *mine* of all *ranks* (None: all) through the store and return ``decide(values)`` on every rank.

    Values and result are JSON; *decide* gets the values in the order of *ranks* and runs on the first of them only.
    ``occasion`` names the exchange in errors. ``patience`` is how long to wait for the slowest rank. A background
    thread must pass ``ranks``, its own ``store`` (a clone, because a connection that waits blocks other threads) and
    ``here``, the rank of this process: nothing then depends on the process group, which may be gone. Raises RankError
    on every rank that takes part when a rank does not arrive in time; the message names the missing ones.
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
    store.set(f"{prefix}/{rank}", json.dumps(mine))
    if rank == members[0]:
        _publish(store, prefix, members, decide, patience)
    try:
        found = _wait(store, [f"{prefix}/result"], patience * 2, prefix, members, lambda: members[:1])
    except dist.DistStoreError as error:
        raise RankError(
            f"rank {rank} waited {patience * 2} for rank {members[0]} at {occasion!r}, and it did not come"
        ) from error
    if found:
        raise RankError(found)
    result = json.loads(store.get(f"{prefix}/result"))
    if background:
        _keep_until_read(store, prefix, members, rank, patience)
    if "elsewhere" in result:
        raise RankError(result["elsewhere"])
    if "missing" in result:
        raise RankError(
            f"ranks {result['missing']} did not come to {occasion!r} within {patience}; look at their logs first"
        )
    return result["result"]


def default_store() -> dist.Store:
    """Return the store of the default process group; torch has no public API for this."""
    return dist.distributed_c10d._get_default_store()


def counted_steps(ranks: Sequence[int] | None = None) -> whereabouts.Place:
    """Return what counts the steps of a new runtime on *ranks* (None: all), so that a rank in one is not waited for."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    members = list(range(world) if ranks is None else ranks)
    if len(members) > 1:
        whereabouts.tell_of_long_steps(default_store())
    return whereabouts.Place.of(members).new_runtime()


def _publish(
    store: dist.Store, prefix: str, members: list[int], decide: Callable[[list[Any]], Any], patience: timedelta
) -> None:
    keys = {rank: f"{prefix}/{rank}" for rank in members}

    def missing() -> list[int]:
        return [rank for rank, key in keys.items() if not store.check([key])]

    try:
        found = _wait(store, list(keys.values()), patience, prefix, members, missing)
        result: dict[str, Any] = {"elsewhere": found}
        if not found:
            result = {"result": decide([json.loads(value) for value in store.multi_get(list(keys.values()))])}
    except dist.DistStoreError:
        result = {"missing": missing()}
    store.set(f"{prefix}/result", json.dumps(result))


def _wait(
    store: dist.Store,
    keys: list[str],
    patience: timedelta,
    prefix: str,
    members: list[int],
    missing: Callable[[], list[int]],
) -> str:
    """Wait for *keys*; return where a rank is that will not come. A background thread meets whatever training does."""
    if dist.is_initialized() and store is default_store():
        return whereabouts.wait(store, keys, patience, prefix, members, missing)
    store.wait(keys, patience)
    return ""


def _keep_until_read(store: dist.Store, prefix: str, members: list[int], rank: int, patience: timedelta) -> None:
    """Have the first rank wait until the others have read the result: its process may hold the store, and end next."""
    store.set(f"{prefix}/{rank}/read", "")
    if rank == members[0]:
        with suppress(dist.DistStoreError):  # a rank that has failed reads nothing
            store.wait([f"{prefix}/{member}/read" for member in members], patience)


def compare(occasion: str, fields: Mapping[str, str], ranks: Sequence[int] | None = None) -> None:
    """Raise RankError on every rank when *fields* differ between ranks; the message lists each field and the ranks."""
    _refuse(occasion, consensus(occasion, dict(fields), differences, ranks))


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
    patience: timedelta = _PATIENCE,
    store: dist.Store | None = None,
    here: int | None = None,
) -> list[Any]:
    """Return the *value* of every rank, in the order of *ranks*; when any rank has a *failure*, raise on all.

    Values are JSON; where all are None the result is an empty list. Arguments as for :func:`consensus`, errors as for
    :func:`report`.
    """
    rank = here if here is not None else dist.get_rank() if dist.is_initialized() else 0
    error = "" if failure is None else f"{type(failure).__name__}: {failure}"
    failed, values = consensus(occasion, [rank, error, value], _failed_or_values, ranks, patience, store, here)
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
