"""The shards of the parameters as the user has them, whose every write can be counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class ParameterShard(DTensor):
    """A shard whose ``data`` shares its count of writes, where torch's has one of its own; it takes no other storage.

    What is computed from it is a DTensor.
    """

    __slots__ = ()

    @property
    def data(self) -> Tensor:
        """The shard without its gradient, to be written in place."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> NoReturn:
        raise RuntimeError(
            "parameter.data = ... gives a parameter other storage, from which megatron_fsdp does not compute; write in "
            "place, parameter.data.copy_(...)"
        )


def guard(model: nn.Module, shards: Mapping[str, Any]) -> None:
    """Make each of *shards*, the parameters of *model* by name, a ParameterShard, and let no module replace them."""
    names = {id(shard): name for name, shard in shards.items()}
    for shard in shards.values():
        shard.__class__ = ParameterShard
    for module in model.modules():
        module.__dict__["_apply"] = partial(_apply, names, module)  # which module.to() and its like call


def _apply(
    names: Mapping[int, str], module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True
) -> nn.Module:
    """Convert or move what *module* has beside shards; refuse what would convert or move these."""
    own: dict[str, Any] = module._parameters
    shards = {slot: shard for slot, shard in own.items() if isinstance(shard, ParameterShard)}
    for shard in shards.values():
        with torch.no_grad():
            changed = function(shard) is not shard
        if changed:
            raise RuntimeError(
                f"{names[id(shard)]} would be converted or moved, and megatron_fsdp goes on with what it took over; "
                "load the model in the dtype that it should have, on the device of its mesh"
            )
    own.update(dict.fromkeys(shards))  # torch would make new parameters of them, even if nothing changes
    try:
        type(module)._apply(module, function, recurse)
    finally:
        own.update(shards)
    return module
