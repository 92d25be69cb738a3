"""A meeting of all ranks, through the store of the process group.

It is no collective: ranks that are about to do different things, and a rank that has already failed, can still meet, so
a disagreement ends in an error that names the ranks instead of in a hang. Rank 0 reads what everybody brought and tells
everybody one verdict, which costs each rank two round trips to the store.
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
_held: defaultdict[str, int] = defaultdict(int)  # every rank holds its meetings in the same order


def meet(
    occasion: str,
    brought: Any,
    judge: Callable[[list[Any]], Any],
    ranks: Sequence[int] | None = None,
    patience: timedelta = _PATIENCE,
    store: dist.Store | None = None,
) -> Any:
    """Return, on every rank, what *judge* makes of what the ranks brought: JSON values, in the order of *ranks*.

    Only the first of *ranks* (None: all) judges. ``patience`` is for the slowest rank. A background thread passes a
    ``store`` of its own (a clone): a connection that waits is of no use to other threads meanwhile. Raises RankError on
    every rank when one does not come; it names the missing ones.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return judge([brought])
    members = list(range(dist.get_world_size()) if ranks is None else ranks)
    store = store or default_store()
    name = occasion if ranks is None else f"{occasion} of {members}"
    _held[name] += 1
    prefix = f"nemo_dist/{name}/{_held[name]}"
    rank = dist.get_rank()
    store.set(f"{prefix}/{rank}", json.dumps(brought))
    if rank == members[0]:
        _preside(store, prefix, members, judge, patience)
    try:
        store.wait([f"{prefix}/verdict"], patience * 2)
    except dist.DistStoreError as error:
        raise RankError(
            f"rank {rank} waited {patience * 2} for rank {members[0]} at {occasion!r}, and it did not come"
        ) from error
    verdict = json.loads(store.get(f"{prefix}/verdict"))
    if "missing" in verdict:
        raise RankError(
            f"ranks {verdict['missing']} did not come to {occasion!r} within {patience}; look at their logs first"
        )
    return verdict["verdict"]


def default_store() -> dist.Store:
    """Return the store of the process group; torch has no public name for it."""
    return dist.distributed_c10d._get_default_store()


def _preside(
    store: dist.Store, prefix: str, members: list[int], judge: Callable[[list[Any]], Any], patience: timedelta
) -> None:
    keys = {rank: f"{prefix}/{rank}" for rank in members}
    try:
        store.wait(list(keys.values()), patience)
        verdict = {"verdict": judge([json.loads(value) for value in store.multi_get(list(keys.values()))])}
    except dist.DistStoreError:
        verdict = {"missing": [rank for rank, key in keys.items() if not store.check([key])]}
    store.set(f"{prefix}/verdict", json.dumps(verdict))


def compare(occasion: str, fields: Mapping[str, str]) -> None:
    """Raise RankError on every rank when *fields* differ between ranks; it says which ranks and which fields."""
    differing = meet(occasion, dict(fields), _differences)
    if differing:
        raise RankError(f"the ranks disagree about {occasion}:\n" + "\n".join(f"- {line}" for line in differing))


def _differences(answers: Sequence[Mapping[str, str]]) -> list[str]:
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


def report(
    occasion: str,
    failure: BaseException | None,
    ranks: Sequence[int] | None = None,
    patience: timedelta = _PATIENCE,
    store: dist.Store | None = None,
) -> None:
    """Raise on every one of *ranks* when one brought a *failure*: its own there, RankError that quotes it elsewhere."""
    mine = dist.get_rank() if dist.is_initialized() else 0
    brought = [mine, "" if failure is None else f"{type(failure).__name__}: {failure}"]
    failed = meet(
        occasion, brought, lambda answers: [answer for answer in answers if answer[1]], ranks, patience, store
    )
    if failure is not None:
        raise failure
    if failed:
        lines = "\n".join(f"- rank {rank}: {text}" for rank, text in failed)
        raise RankError(f"{occasion} failed on {len(failed)} of the ranks:\n{lines}")
