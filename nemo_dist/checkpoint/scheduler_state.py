"""The state of learning-rate schedulers in a checkpoint, adapted to the number of parameter groups of the optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from nemo_dist.checkpoint.json_state import to_json
from nemo_dist.checkpoint.optimizer_state import GROUP
from nemo_dist.errors import CheckpointError

# Rates that schedulers list per parameter group, and the groups hold too, under another name.
_RATES = {"base_lrs": "initial_lr", "_last_lr": "lr"}
_PER_GROUP = ("_last_lr", "_lrs", "_lambdas", "_momentums")  # how names of lists with a value per group end
_NESTED = "_schedulers"


def scheduler_state(scheduler: Any) -> dict[str, Any]:
    """Return the state of *scheduler* without the rates that the parameter groups of its optimizer hold too.

    Other values per group are one for each group that the user gave, or one for all where they are equal: by their
    meshes those are split into other groups on other ranks, and when the checkpoint is loaded.
    """
    return _without_groups(scheduler.state_dict(), _groups(scheduler))


def _without_groups(state: Mapping[str, Any], groups: Sequence[Any]) -> dict[str, Any]:
    kept = {
        name: _of_given_groups(value, groups) if _is_per_group(name, value, groups) else value
        for name, value in state.items()
        if name not in _RATES or value != [group.get(_RATES[name]) for group in groups]
    }
    if _NESTED in kept:
        kept[_NESTED] = [_without_groups(one, groups) for one in kept[_NESTED]]
    return kept


def _is_per_group(name: str, value: Any, groups: Sequence[Any]) -> bool:
    return name.endswith(_PER_GROUP) and isinstance(value, list) and len(value) == len(groups)


def _of_given_groups(values: list[Any], groups: Sequence[Any]) -> list[Any]:
    """Return one of *values*, where all are equal, or one for each group that the user gave, where its parts agree."""
    if _equal(values):
        return values[:1]
    of_index: dict[Any, list[Any]] = {}
    for index, value in zip(_indices(groups), values, strict=True):
        of_index.setdefault(index, []).append(value)
    return [several[0] for several in of_index.values()] if all(map(_equal, of_index.values())) else values


def _equal(values: Sequence[Any]) -> bool:
    texts = [to_json(value, "the state of a scheduler") for value in values]
    return all(text == texts[0] for text in texts)


def _indices(groups: Sequence[Any]) -> list[Any]:
    """Return the index that the user gave each of *groups*, or a name of its own to one that was added otherwise."""
    return [group.get(GROUP, f"group {position}") for position, group in enumerate(groups)]


def fitted(scheduler: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return *state* with its lists per parameter group adapted to the groups of *scheduler*.

    Raises CheckpointError where the number of groups that the user gave differs from when it was saved, and a list has
    unequal values, and for the state of another kind of scheduler.
    """
    own, groups, kind = scheduler.state_dict(), _groups(scheduler), type(scheduler).__name__
    _refuse_another_kind(kind, own, state)
    fit = {
        name: _of_groups(kind, name, value, groups)
        if isinstance(value, list) and _is_per_group(name, own.get(name), groups)
        else value
        for name, value in state.items()
    }
    if _NESTED in fit:
        fit[_NESTED] = [fitted(one, its) for one, its in zip(scheduler._schedulers, fit[_NESTED], strict=True)]
    return fit


def _of_groups(kind: str, name: str, values: list[Any], groups: Sequence[Any]) -> list[Any]:
    """Return one of *values*, which are as ``_of_given_groups`` returned them, for each of *groups*."""
    indices = _indices(groups)
    given = list(dict.fromkeys(indices))
    if _equal(values):
        return values[:1] * len(groups)
    if len(values) == len(given):
        return [values[given.index(index)] for index in indices]
    if len(values) != len(groups):
        raise CheckpointError(
            f"{kind} was saved with {name} {values} for {len(values)} groups of the optimizer, and here are "
            f"{len(given)}; group the parameters as they were"
        )
    return values


def _refuse_another_kind(kind: str, own: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Raise CheckpointError where *state* is not of a scheduler like that of *own*: torch would fail halfway."""
    odd = [name for name in sorted(own.keys() ^ state.keys()) if name.endswith((*_PER_GROUP, _NESTED))]
    for name in odd:
        if name not in _RATES:
            where = "the one to load" if name in own else "the one that was saved"
            raise CheckpointError(
                f"{kind} cannot take what was saved with another schedule ({name} is only in {where}); pass the "
                "schedule that was saved"
            )


def restore_scheduler(scheduler: Any, state: Mapping[str, Any]) -> None:
    """Load *state*, as ``fitted`` returned it, into *scheduler*; rates that it lacks come from the groups."""
    scheduler.load_state_dict(dict(state))
    take_rates(scheduler, state)


def take_rates(scheduler: Any, state: Mapping[str, Any]) -> None:
    """Have *scheduler* start from the rates of the parameter groups of its optimizer, but those in *state*."""
    for name, key in _RATES.items():
        if name not in state and hasattr(scheduler, name):
            setattr(scheduler, name, [_number(group.get(key)) for group in _groups(scheduler)])
    for one, its in zip(getattr(scheduler, _NESTED, ()), state.get(_NESTED, ()), strict=True):
        take_rates(one, its)


def _groups(scheduler: Any) -> Sequence[Any]:
    found: Sequence[Any] = getattr(getattr(scheduler, "optimizer", None), "param_groups", ())
    return found


def _number(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
