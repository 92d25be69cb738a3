"""Gather small values through the store of the process group; rank 0 computes one result, and all read it.

This is no collective: it also works between ranks that are about to do different things, and when one of them has
failed, so that a disagreement ends in an error that names the ranks instead of in a hang. It costs each rank two round
trips to the store, and rank 0 one read per rank.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from nemo_dist.errors import RankError

_PATIENCE = timedelta(minutes=5)
_held: defaultdict[str, int] = defaultdict(int)  # every rank asks for the same results in the same order


def consensus(
    occasion: str,
    mine: Any,
    decide: Callable[[list[Any]], Any],
    ranks: Sequence[int] | None = None,
    patience: timedelta = _PATIENCE,
    store: dist.Store | None = None,
) -> Any:
    """Return, on every rank, what *decide* makes of the values of all: JSON values, in the order of *ranks*.

    *decide* runs on the first of *ranks* (None: all) only. ``occasion`` names what this is about, in errors.
    ``patience`` is for the slowest rank. A background thread passes a ``store`` of its own (a clone): a connection that
    waits is of no use to other threads meanwhile. Raises RankError on every rank when one does not come; it names the
    missing ones.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return decide([mine])
    members = list(range(dist.get_world_size()) if ranks is None else ranks)
    store = store or default_store()
    name = occasion if ranks is None else f"{occasion} of {members}"
    _held[name] += 1
    prefix = f"nemo_dist/{name}/{_held[name]}"
    rank = dist.get_rank()
    store.set(f"{prefix}/{rank}", json.dumps(mine))
    if rank == members[0]:
        _publish(store, prefix, members, decide, patience)
    try:
        store.wait([f"{prefix}/result"], patience * 2)
    except dist.DistStoreError as error:
        raise RankError(
            f"rank {rank} waited {patience * 2} for rank {members[0]} at {occasion!r}, and it did not come"
        ) from error
    result = json.loads(store.get(f"{prefix}/result"))
    if "missing" in result:
        raise RankError(
            f"ranks {result['missing']} did not come to {occasion!r} within {patience}; look at their logs first"
        )
    return result["result"]


def default_store() -> dist.Store:
    """Return the store of the process group; torch has no public name for it."""
    return dist.distributed_c10d._get_default_store()


def _publish(
    store: dist.Store, prefix: str, members: list[int], decide: Callable[[list[Any]], Any], patience: timedelta
) -> None:
    keys = {rank: f"{prefix}/{rank}" for rank in members}
    try:
        store.wait(list(keys.values()), patience)
        result = {"result": decide([json.loads(value) for value in store.multi_get(list(keys.values()))])}
    except dist.DistStoreError:
        result = {"missing": [rank for rank, key in keys.items() if not store.check([key])]}
    store.set(f"{prefix}/result", json.dumps(result))


def compare(occasion: str, fields: Mapping[str, str], ranks: Sequence[int] | None = None) -> None:
    """Raise RankError on every rank when *fields* differ between ranks; it says which ranks and which fields."""
    differing = consensus(occasion, dict(fields), differences, ranks)
    if differing:
        raise RankError(f"the ranks disagree about {occasion}:\n" + "\n".join(f"- {line}" for line in differing))


def differences(answers: Sequence[Mapping[str, str]]) -> list[str]:
    """Say, per field, which ranks differ from the value that most ranks have."""
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
    """Raise on every one of *ranks* when one has a *failure*: its own there, RankError that quotes it elsewhere."""
    share(occasion, None, failure, ranks)


def share(
    occasion: str,
    value: Any,
    failure: BaseException | None,
    ranks: Sequence[int] | None = None,
    patience: timedelta = _PATIENCE,
    store: dist.Store | None = None,
) -> list[Any]:
    """Return the *value* of every rank, JSON values in the order of *ranks*; where one has a *failure*, raise on all.

    Arguments as for :func:`consensus`, errors as for :func:`report`.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    error = "" if failure is None else f"{type(failure).__name__}: {failure}"
    failed, values = consensus(occasion, [rank, error, value], _failed_or_values, ranks, patience, store)
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
