"""The optimizer state of a checkpoint: moments and step counts by parameter name, and options by parameter."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nemo_dist.checkpoint.json_state import from_json, to_json
from nemo_dist.errors import CheckpointError
from nemo_dist.mesh.dtensor import from_local, local, local_slice

# Options for how an optimizer runs on this machine; they do not change its result, so they are not saved.
GROUP = "group_index"  # the option with the index that the user gave a group, which another topology may split
_OWN = ("foreach", "fused", "capturable", "differentiable", GROUP)


def named(
    optimizer: Any, state: Mapping[str, Tensor], copies: Iterable[tuple[Tensor, Tensor]]
) -> dict[str, nn.Parameter]:
    """Return the parameters in *state* that *optimizer* steps, by name; its steps of their *copies* are not listed.

    Raises CheckpointError for a parameter that is neither.
    """
    names = {id(parameter): name for name, parameter in state.items() if isinstance(parameter, nn.Parameter)}
    known = {id(copy) for _, copy in copies}
    found: dict[str, nn.Parameter] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) in names:
                found[names[id(parameter)]] = parameter
            elif id(parameter) not in known:
                raise CheckpointError(
                    f"the optimizer steps a parameter of shape {tuple(parameter.shape)} that the model does not have; "
                    "make it with runtime.optimizer(...)"
                )
    return found


def moments(optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> dict[str, dict[str, Tensor]]:
    """Return the optimizer state of the same shape as its parameter (``exp_avg``), by kind and parameter name.

    Raises CheckpointError for a DTensor of another shape, and for a plain tensor of the shape of the shard.
    """
    kinds: dict[str, dict[str, Tensor]] = {}
    for name, parameter in parameters.items():
        for kind, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                continue
            if value.shape == parameter.shape:
                kinds.setdefault(kind, {})[name] = value
            elif isinstance(value, DTensor):
                raise CheckpointError(
                    f"{type(optimizer).__name__} keeps {kind!r} of {name} as shards of shape {tuple(value.shape)}, not "
                    f"that of the parameter, {tuple(parameter.shape)}; this cannot be saved yet"
                )
            elif value.numel() > 1 and value.shape == local(parameter).shape:
                raise CheckpointError(
                    f"{type(optimizer).__name__} keeps {kind!r} of {name} as a plain tensor of this rank's shard "
                    f"{tuple(value.shape)}, which does not say what part of {tuple(parameter.shape)} it is; keep it as "
                    "a DTensor: torch.zeros_like(parameter)"
                )
    return kinds


def placed(optimizer: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the *state* dict for *optimizer*, with whole tensors cut to the shards of their parameters.

    So the state of an optimizer in one process loads into one over shards, by the order of parameters. Raises
    ValueError for a tensor that is neither whole, nor a DTensor, nor one number.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indices = [index for group in state["param_groups"] for index in group["params"]]
    own = dict(zip(indices, parameters, strict=False))  # torch compares the numbers, after this
    return {
        **state,
        "state": {
            index: {kind: _cut(kind, value, own[index]) for kind, value in entry.items()} if index in own else entry
            for index, entry in state["state"].items()
        },
    }


def _cut(kind: str, value: Any, parameter: nn.Parameter) -> Any:
    if not isinstance(value, Tensor) or isinstance(value, DTensor) or not isinstance(parameter, DTensor):
        return value
    if value.numel() == 1 and value.shape != parameter.shape:
        return value  # a count of steps
    if value.shape != parameter.shape:
        raise ValueError(
            f"{kind!r} of the optimizer has shape {tuple(value.shape)}, its parameter {tuple(parameter.shape)}; pass "
            "whole tensors in the order of this optimizer's parameters, or save with runtime.save and load with "
            "runtime.load"
        )
    part = local_slice(value, parameter).to(parameter.device, copy=True)
    return from_local(part, parameter.device_mesh, parameter.placements, like=parameter)


def counts(optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> dict[str, dict[str, Any]]:
    """Return the rest of the optimizer state (``step``) as JSON, by parameter name and kind."""
    return {
        name: {
            kind: to_json(value, f"{kind!r} of {name}")
            for kind, value in optimizer.state[parameter].items()
            if not (isinstance(value, Tensor) and value.shape == parameter.shape)
        }
        for name, parameter in parameters.items()
        if optimizer.state.get(parameter)
    }


def group_options(optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> list[Any]:
    """Return, per parameter group, its options as JSON and the names of its parameters."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    return [
        [
            {key: to_json(value, f"option {key!r}") for key, value in group.items() if key not in ("params", *_OWN)},
            [names[id(parameter)] for parameter in group["params"] if id(parameter) in names],
        ]
        for group in optimizer.param_groups
        if group["params"]
    ]


def options_of_names(groups: Sequence[Any]) -> dict[str, Mapping[str, Any]]:
    """Return the options of every parameter of *groups*, which are from ``group_options``, as JSON."""
    return {name: options for options, names in groups for name in names}


def by_value(answers: Sequence[Mapping[str, Any] | Sequence[Any]]) -> list[Any]:
    """Merge the pairs of value and names of all ranks: each distinct value once, with all names that have it."""
    names: dict[str, dict[str, None]] = {}
    for answer in answers:
        for value, named in answer.items() if isinstance(answer, Mapping) else answer:
            text = json.dumps(value, sort_keys=True)
            names.setdefault(text, {}).update(dict.fromkeys(named))
    return [[json.loads(text), sorted(members)] for text, members in names.items()]


def options_of_groups(optimizer: Any, parameters: Mapping[str, nn.Parameter], saved: Sequence[Any]) -> list[Any]:
    """Return, for every group of *optimizer*, the options that its parameters were saved with; changes nothing.

    A group without saved parameters gets none. Raises CheckpointError when the parameters of a group were saved with
    different options, ValueError for a saved option that cannot stand where the group's own does.
    """
    value_of = {name: json.dumps(value, sort_keys=True) for value, names in saved for name in names}
    names = {id(parameter): name for name, parameter in parameters.items()}
    chosen = []
    for index, group in enumerate(optimizer.param_groups):
        known = {value_of.get(names.get(id(parameter), "")) for parameter in group["params"]}
        found = sorted(value for value in known if value is not None)
        if len(found) > 1:
            raise CheckpointError(
                f"group {index} of the optimizer has parameters that were saved with different options: "
                f"{' and '.join(found)}; group them as they were"
            )
        options = from_json(json.loads(found[0])) if found else {}
        for key, value in options.items():
            if key in ("params", *_OWN) or not _fits(value, group.get(key)):
                raise ValueError(f"option {key!r} of the optimizer is {value!r}, where it has {group.get(key)!r}")
        chosen.append(options)
    return chosen


def _fits(value: Any, own: Any) -> bool:
    """Whether *value* is of the kind of *own*: a number for a number, as many for a tuple, anything for None."""
    if own is None:
        return True
    if isinstance(own, tuple | list):
        fits = isinstance(value, tuple | list) and len(value) == len(own)
        return fits and all(map(_fits, value, own))
    if isinstance(own, bool | int | float | Tensor):
        return isinstance(value, bool | int | float) or (isinstance(value, Tensor) and value.numel() == 1)
    return value is None or isinstance(value, type(own))


def count_of(saved: Sequence[Any]) -> Callable[[str, bool], Any]:
    """Return a function from a parameter's name, and whether it has moments, to its saved step counts.

    A parameter that has moments but no saved counts, because its name differs under another topology, gets the counts
    that all parameters share, if they share them.
    """
    for value, _ in saved:
        for kind, found in from_json(value).items():  # each parameter gets a copy of its own later
            if not isinstance(found, Tensor | bool | int | float | list | None):
                raise ValueError(f"{kind!r} of the optimizer is a {type(found).__name__}")
    value_of = {name: value for value, names in saved for name in names}
    common = saved[0][0] if len(saved) == 1 else {}
    return lambda name, has_moments: from_json(value_of.get(name, common if has_moments else {}))


def copy_state(optimizer: Any, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Give the second parameter of each of *pairs* a copy of the state that *optimizer* has of the first."""
    for parameter, copy in pairs:
        if parameter in optimizer.state:
            optimizer.state[copy] = {
                kind: value.clone() if isinstance(value, Tensor) else value
                for kind, value in optimizer.state[parameter].items()
            }


def place(value: Any, parameter: nn.Parameter, group: Mapping[str, Any]) -> Any:
    """Return *value* where the optimizer expects it: on the parameter's device if it is capturable or fused."""
    if isinstance(value, Tensor) and (group.get("capturable") or group.get("fused")):
        return value.to(parameter.device)
    return value
