"""The state of learning-rate schedulers in a checkpoint, adapted to the number of parameter groups of the optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from nemo_dist.errors import CheckpointError

# What schedulers list per parameter group: rates that the groups hold too, under another name, and other values.
_RATES = {"base_lrs": "initial_lr", "_last_lr": "lr"}
_PER_GROUP = ("min_lrs", "max_lrs", "base_momentums", "max_momentums")
_NESTED = "_schedulers"


def scheduler_state(scheduler: Any) -> dict[str, Any]:
    """Return the state of *scheduler* without the rates that the parameter groups of its optimizer hold too.

    The number of groups may differ when the checkpoint is loaded.
    """
    return _without_rates(scheduler.state_dict(), _groups(scheduler))


def _without_rates(state: Mapping[str, Any], groups: Sequence[Any]) -> dict[str, Any]:
    kept = {
        name: value
        for name, value in state.items()
        if name not in _RATES or value != [group.get(_RATES[name]) for group in groups]
    }
    if _NESTED in kept:
        kept[_NESTED] = [_without_rates(one, groups) for one in kept[_NESTED]]
    return kept


def fitted(scheduler: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return *state* with its lists per parameter group adapted to the number of groups of *scheduler*.

    Raises CheckpointError when the number differs from when it was saved, and a list has unequal values.
    """
    fit, count = dict(state), len(_groups(scheduler))
    for name in (*_RATES, *_PER_GROUP):
        listed = fit.get(name)
        if isinstance(listed, list) and len(listed) != count:
            if any(value != listed[0] for value in listed):
                raise CheckpointError(
                    f"{type(scheduler).__name__} was saved with {name} {listed} for {len(listed)} groups of the "
                    f"optimizer, and here are {count}; group the parameters as they were"
                )
            fit[name] = listed[:1] * count
    if _NESTED in fit:
        fit[_NESTED] = [fitted(one, its) for one, its in zip(scheduler._schedulers, fit[_NESTED], strict=True)]
    return fit


def restore_scheduler(scheduler: Any, state: Mapping[str, Any]) -> None:
    """Load *state*, as ``fitted`` returned it, into *scheduler*; rates that it lacks come from the groups."""
    scheduler.load_state_dict(dict(state))
    _take_rates(scheduler, state)


def _take_rates(scheduler: Any, state: Mapping[str, Any]) -> None:
    for name, key in _RATES.items():
        if name not in state and hasattr(scheduler, name):
            setattr(scheduler, name, [_number(group.get(key)) for group in _groups(scheduler)])
    for one, its in zip(getattr(scheduler, _NESTED, ()), state.get(_NESTED, ()), strict=True):
        _take_rates(one, its)


def _groups(scheduler: Any) -> Sequence[Any]:
    found: Sequence[Any] = getattr(getattr(scheduler, "optimizer", None), "param_groups", ())
    return found


def _number(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
