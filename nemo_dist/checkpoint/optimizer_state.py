"""The optimizer in the canonical state: its moments by parameter name, its options by parameter."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nemo_dist.checkpoint.json_state import from_json, to_json
from nemo_dist.errors import CheckpointError

# How an optimizer computes on this machine; what it computes is the same.
_OWN = ("foreach", "fused", "capturable", "differentiable")
# What schedulers list per group of the optimizer: rates that are the groups' own under another name, and others.
_RATES = {"base_lrs": "initial_lr", "_last_lr": "lr"}
_PER_GROUP = ("min_lrs", "max_lrs", "base_momentums", "max_momentums")
_NESTED = "_schedulers"


def named(optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return the parameters that *optimizer* steps, by name; raise CheckpointError for one without a name."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    found = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise CheckpointError(
                    f"the optimizer steps a parameter of shape {tuple(parameter.shape)} that the model does not have; "
                    "make it with runtime.optimizer(...)"
                )
            found[names[id(parameter)]] = parameter
    return found


def moments(optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> dict[str, dict[str, Tensor]]:
    """Return the tensors that are laid out as their parameter: for each kind (``exp_avg``), by parameter name."""
    kinds: dict[str, dict[str, Tensor]] = {}
    for name, parameter in parameters.items():
        for kind, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                kinds.setdefault(kind, {})[name] = value
            elif isinstance(value, DTensor):
                raise CheckpointError(
                    f"{type(optimizer).__name__} keeps {kind!r} of {name} as shards of shape {tuple(value.shape)}, not "
                    f"that of the parameter, {tuple(parameter.shape)}; this cannot be saved yet"
                )
    return kinds


def counts(optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> dict[str, dict[str, Any]]:
    """Return the rest of the state (``step``) as JSON: by parameter name, by kind."""
    return {
        name: {
            kind: to_json(value, f"{kind!r} of {name}")
            for kind, value in optimizer.state[parameter].items()
            if not (isinstance(value, Tensor) and value.shape == parameter.shape)
        }
        for name, parameter in parameters.items()
        if optimizer.state.get(parameter)
    }


def options(optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> list[Any]:
    """Return the options of every group, as JSON, with the names of its parameters."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    return [
        [
            {key: to_json(value, f"option {key!r}") for key, value in group.items() if key not in ("params", *_OWN)},
            [names[id(parameter)] for parameter in group["params"]],
        ]
        for group in optimizer.param_groups
    ]


def by_value(answers: Sequence[Mapping[str, Any] | Sequence[Any]]) -> list[Any]:
    """Join what ranks said of each name: pairs of a value and all names that have it."""
    names: dict[str, dict[str, None]] = {}
    for answer in answers:
        for value, named in answer.items() if isinstance(answer, Mapping) else answer:
            text = json.dumps(value, sort_keys=True)
            names.setdefault(text, {}).update(dict.fromkeys(named))
    return [[json.loads(text), sorted(members)] for text, members in names.items()]


def options_of_groups(optimizer: Any, parameters: Mapping[str, nn.Parameter], saved: Sequence[Any]) -> list[Any]:
    """Return, for every group of *optimizer*, the options that its parameters were saved with; changes nothing."""
    value_of = {name: json.dumps(value, sort_keys=True) for value, names in saved for name in names}
    names = {id(parameter): name for name, parameter in parameters.items()}
    chosen = []
    for index, group in enumerate(optimizer.param_groups):
        known = {value_of.get(names[id(parameter)]) for parameter in group["params"]}
        found = sorted(value for value in known if value is not None)
        if len(found) > 1:
            raise CheckpointError(
                f"group {index} of the optimizer has parameters that were saved with different options: "
                f"{' and '.join(found)}; group them as they were"
            )
        chosen.append(from_json(json.loads(found[0])) if found else {})
    return chosen


def count_of(saved: Sequence[Any]) -> Callable[[str, bool], Any]:
    """Return what gives the counts saved of a name.

    One that has moments, but no counts because a topology names it otherwise, gets those that are the same for all.
    """
    value_of = {name: value for value, names in saved for name in names}
    common = saved[0][0] if len(saved) == 1 else {}
    return lambda name, has_moments: from_json(value_of.get(name, common if has_moments else {}))


def place(value: Any, parameter: nn.Parameter, group: Mapping[str, Any]) -> Any:
    """Return *value* on the device where the optimizer expects it."""
    if isinstance(value, Tensor) and (group.get("capturable") or group.get("fused")):
        return value.to(parameter.device)
    return value


def scheduler_state(scheduler: Any) -> dict[str, Any]:
    """Return the state of *scheduler* without the rates that its optimizer's groups have too, as other groups come."""
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
    """Return *state* for the groups of *scheduler*: what is listed per group, with one value for each.

    Raises CheckpointError where there are more or fewer groups than when it was saved, and the values differ.
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
    """Load *state*, which is ``fitted``, into *scheduler*; the rates that it lacks are those of the groups."""
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
