"""A per-module override of how parameters are sharded, which the strategy honours.

A plugin of an earlier stage marks a module; the strategy, whichever it is, honours the mark. Neither knows the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

_MARK = "nemo_dist_sharding_override"


@attrs.frozen(kw_only=True, eq=False)
class ShardingOverride:
    """How a strategy shards one module and all that is in it.

    ``mesh``: shard over its last axis; an outer axis, if any, holds replicas; None leaves the strategy's own.
    ``grad_divisor``: the gradients of all ranks of *mesh* are added and divided by this. ``dims``: the dim to shard, 0
    by default, by the parameter's name in the module. ``reshard_after_forward`` and ``mp_policy`` (torch's, or its
    fields as a mapping) take the place of the strategy's own; None leaves them.
    """

    mesh: DeviceMesh | None = None
    grad_divisor: int = 1
    dims: Mapping[str, int] = attrs.field(factory=dict)
    reshard_after_forward: bool | None = None
    mp_policy: Any = None


def override_sharding(module: nn.Module, how: ShardingOverride) -> None:
    """Mark *module*: a strategy shards it as *how* says."""
    setattr(module, _MARK, how)


def sharding_overrides(model: nn.Module) -> dict[nn.Module, ShardingOverride]:
    """Return the marked modules of *model* and how to shard each."""
    return {module: found for module in model.modules() if (found := getattr(module, _MARK, None)) is not None}
