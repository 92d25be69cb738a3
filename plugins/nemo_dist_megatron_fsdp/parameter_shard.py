"""The shards of the parameters as the user has them, whose every write can be counted."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor
from torch.distributed.tensor import DTensor

from nemo_dist.torch_private import changes_in_place


class ParameterShard(DTensor):
    """A shard whose ``data`` shares its count of writes, where torch's has one of its own; it takes no other storage.

    ``shard.__class__ = ParameterShard`` makes one of a DTensor. What is computed from it is a DTensor.
    """

    __slots__ = ()

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """The shard without its gradient, to be written in place."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> NoReturn:
        raise RuntimeError(
            "parameter.data = ... gives a parameter other storage, from which megatron_fsdp does not compute; write in "
            "place, parameter.data.copy_(...)"
        )


def changes(tensor: Any) -> int:
    """Count writes to a DTensor: to itself, and to its local tensor, which torch counts apart."""
    return changes_in_place(tensor) + changes_in_place(tensor.to_local())
