"""Find out whether an optimizer steps shards of tensors as it steps whole tensors, by letting it step tiny ones.

An optimizer that treats every element by itself (AdamW) gives the same on shards; one that looks at whole rows or
tensors (a factored moment, a norm, an orthogonalisation) may give something else, or stop at a DTensor. Names say
nothing about optimizers of third parties, so each is tried out.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.optim import Optimizer

from nemo_dist.mesh.mesh_context import MeshContext
from nemo_dist.mesh.process_group import made_on_cpu
from nemo_dist.mesh.store_consensus import consensus
from nemo_dist.planning.mesh_plan import Role

_STEPS = 3
_STEPS_OF_OTHERS = 40  # of an optimizer that is not torch's: some look at whole tensors only now and then, or later
_RATE = 0.1  # at least: in steps as small as those at the beginning of a warm-up, no difference would be seen
_TOLERANCE = 1e-5


def refuse_what_mixes_elements(
    kind: type[Optimizer], groups: Sequence[Mapping[str, Any]], options: Mapping[str, Any], mesh: MeshContext
) -> None:
    """Raise ValueError on all ranks when *kind* does not step the sharded parameters of *groups* as one process would.

    Collective over all ranks; the steps that are tried out communicate what the optimizer itself does.
    """
    split = mesh.size(Role.LAYERS) > 1
    if mesh.device_mesh is None or not (split or any(_shards(group["params"]) for group in groups)):
        return
    with made_on_cpu():
        found = next(_problems(kind, groups, options, split), "")
    ranks = mesh.device_mesh.mesh.flatten().tolist()
    said = consensus(f"trying out {kind.__name__}", found, lambda answers: next(filter(None, answers), ""), ranks)
    if said:
        raise ValueError(
            f"{kind.__name__} does not step parameters on several ranks as on one process: {said}; use an optimizer "
            "that updates each element by itself (AdamW, SGD, Adagrad), or a strategy that keeps the whole model on "
            "every rank"
        )


def warn_of_lost_updates(groups: Sequence[Mapping[str, Any]]) -> None:
    """Warn of parameters that are stored in fewer than 4 bytes: most updates of a small learning rate round away."""
    few = {
        str(one.dtype) for group in groups for one in group["params"] if one.dtype in (torch.bfloat16, torch.float16)
    }
    if few:
        name = min(few).removeprefix("torch.")
        warnings.warn(
            f"the optimizer updates parameters that are stored in {name}, where updates below some 1/500 of a weight "
            "round away; load with dtype=torch.float32 (mp_policy says in which dtype the model computes)",
            stacklevel=4,
        )


def _problems(
    kind: type[Optimizer], groups: Sequence[Mapping[str, Any]], options: Mapping[str, Any], split: bool
) -> Iterator[str]:
    """Yield what is wrong with *kind*; *split*: whether other ranks hold other parameters."""
    for group in groups:
        more = {name: value for name, value in group.items() if name != "params"}
        for ndim, device_mesh, placements in _layouts(group["params"]):
            if device_mesh is None and not split:
                continue
            tensors = _tensors(ndim, device_mesh, placements, group["params"][0].device)
            whole = _stepped(kind, more, options, tensors)
            if isinstance(whole, str):
                yield f"a step of it could not be tried out ({whole})"
                return
            if split:
                alone = [_stepped(kind, more, options, [one]) for one in tensors]
                if any(isinstance(one, str) or _unlike(one[0], two) for one, two in zip(alone, whole, strict=True)):
                    yield "what it does to one tensor depends on others, which another pipeline stage may hold"
            if device_mesh is None:
                continue
            shards = [_sharded(one, device_mesh, placements) for one in tensors]
            found = _stepped(kind, more, options, shards)
            if isinstance(found, str):
                yield f"it stops at a sharded tensor ({found})"
                return
            expected = [_sharded(one, device_mesh, placements) for one in whole]
            if any(_unlike(one, two) for one, two in zip(found, expected, strict=True)):
                yield f"on a tensor of {ndim} dimensions its update mixes the elements of different ranks"


def _shards(params: Sequence[Tensor]) -> bool:
    return any(isinstance(parameter, DTensor) and parameter.device_mesh.size() > 1 for parameter in params)


def _layouts(params: Sequence[Any]) -> Iterator[tuple[int, DeviceMesh | None, tuple[Any, ...]]]:
    """Yield every different layout of *params* once: number of dims, mesh, and along which dims it is sharded."""
    layouts: dict[Any, None] = {}
    for parameter in params:
        if _shards([parameter]):
            plain = tuple(Shard(one.dim) if hasattr(one, "dim") else Replicate() for one in parameter.placements)
            layouts[parameter.ndim, parameter.device_mesh, plain] = None
        else:
            layouts[parameter.ndim, None, ()] = None
    yield from layouts


def _tensors(ndim: int, mesh: DeviceMesh | None, placements: Sequence[Any], device: torch.device) -> list[Tensor]:
    """Return two tensors with different values, of two elements along each dim for every rank that shares it."""
    shape = [2] * ndim
    for axis, placement in enumerate(placements):
        if isinstance(placement, Shard) and mesh is not None:
            shape[placement.dim] *= mesh.size(axis)
    generator = torch.Generator().manual_seed(ndim)
    return [torch.randn(shape, generator=generator).to(device) for _ in range(2)]


def _sharded(whole: Tensor, mesh: DeviceMesh, placements: Sequence[Any]) -> Tensor:
    """Return the DTensor of *whole*; every rank takes its slice, without communication."""
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)


def _stepped(
    kind: type[Optimizer], more: Mapping[str, Any], options: Mapping[str, Any], tensors: Sequence[Tensor]
) -> list[Tensor] | str:
    """Return *tensors* after some steps of an optimizer on gradients that depend on their values; or what it raised."""
    params = [nn.Parameter(tensor.clone()) for tensor in tensors]
    try:
        optimizer = kind([{**more, "params": params}], **options)
        for group in optimizer.param_groups:
            if isinstance(group.get("lr"), int | float | Tensor):
                group["lr"] = max(float(group["lr"]), _RATE)
        for step in range(_STEPS if kind.__module__.startswith("torch.optim.") else _STEPS_OF_OTHERS):
            for parameter in params:
                parameter.grad = (parameter.detach() + step).sin() * (step % 3 + 1)  # which never settles
            optimizer.step()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return [parameter.detach() for parameter in params]


def _unlike(found: Tensor, expected: Tensor) -> bool:
    one, two = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in (found, expected))
    return one.shape != two.shape or not torch.allclose(one, two, rtol=_TOLERANCE, atol=_TOLERANCE)


def keeps_state(kind: type[Optimizer], options: Mapping[str, Any]) -> bool:
    """Whether *kind* keeps state (moments, a count of steps) after a step; True where it cannot be tried out."""
    parameter = nn.Parameter(torch.ones(2, 2))
    parameter.grad = torch.ones(2, 2)
    try:
        optimizer = kind([parameter], **options)
        optimizer.step()
    except Exception:
        return True
    return bool(optimizer.state.get(parameter))
