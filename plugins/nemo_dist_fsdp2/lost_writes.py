"""Raise where a forward changes a parameter: it changes the gathered copy, which is freed, and not the shards."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from nemo_dist.hf_model import class_name, plain_class
from nemo_dist.plugin.forwards import wrap_forward
from nemo_dist.torch_private import assert_on_device, changes_in_place
from nemo_dist.training.forward_code import Path, value_at, written_data


def refuse_lost_writes(model: nn.Module, counted: bool) -> None:
    """Compare, around the forward of the group that gathers it, each parameter of *model* that code of it writes.

    Writes to a parameter itself are counted, in a model of the user's own code, and those to its ``data`` are not.
    """
    gathering: list[Any] = [one for one in model.modules() if counted and isinstance(one, FSDPModule)]
    for module in gathering:
        wrap_forward(module, partial(_unwritten, module))
    for name, module in model.named_modules():
        kind: Any = plain_class(module)
        for path in written_data(kind):
            if isinstance(value_at(module, path), nn.Parameter):
                wrap_forward(_gathering(model, name), partial(_unchanged, module, path))


def _unwritten(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    before = {name: (parameter, changes_in_place(parameter)) for name, parameter in module.named_parameters()}
    output = forward(*args, **kwargs)
    for name, (parameter, changes) in before.items():
        if changes_in_place(parameter) != changes:
            raise RuntimeError(
                f"{class_name(module)} changes {name} in its forward, which is lost in shards; use 'ddp'"
            )
    return output


def _gathering(model: nn.Module, name: str) -> nn.Module:
    """Return the innermost module, that called *name* or one around it, which FSDP2 gathers."""
    module = model.get_submodule(name)
    return module if isinstance(module, FSDPModule) or not name else _gathering(model, name.rpartition(".")[0])


def _unchanged(module: nn.Module, path: Path, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    before = value_at(module, path).detach().clone()
    output = forward(*args, **kwargs)
    same = (before == value_at(module, path).detach()).all()
    name = ".".join(path)
    message = f"{class_name(module)} changes {name} in its forward, which is lost in shards; use 'ddp'"
    assert_on_device(same, message)
    return output
