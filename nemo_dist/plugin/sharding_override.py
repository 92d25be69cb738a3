"""Per-module sharding override that the strategy honours.

A plugin of an earlier stage sets the override on a module; the selected strategy reads it when it shards the model.
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
    """How the strategy shards one module and its submodules.

    ``mesh``: shard over its last axis and replicate over an outer axis, if any; None keeps the strategy's mesh.
    ``grad_divisor``: gradients are summed over all ranks of *mesh* and divided by this. ``dims``: the tensor dim to
    shard by parameter name in the module, 0 by default. ``reshard_after_forward`` and ``mp_policy`` (torch's, or its
    fields as a mapping) replace the strategy's own; None keeps them.
    """

    mesh: DeviceMesh | None = None
    grad_divisor: int = 1
    dims: Mapping[str, int] = attrs.field(factory=dict)
    reshard_after_forward: bool | None = None
    mp_policy: Any = None


def override_sharding(module: nn.Module, how: ShardingOverride) -> None:
    """Set the sharding override of *module* to *how*."""
    setattr(module, _MARK, how)


def sharding_overrides(model: nn.Module) -> dict[nn.Module, ShardingOverride]:
    """Return the modules of *model* that have a sharding override, with their overrides."""
    return {module: found for module in model.modules() if (found := getattr(module, _MARK, None)) is not None}
