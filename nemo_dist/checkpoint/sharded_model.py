"""The sharded model as saving, loading and exporting see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import attrs
from torch import nn

from nemo_dist.checkpoint.chunks import Planner
from nemo_dist.hf_model import class_name, inner_model
from nemo_dist.mesh.mesh_context import MeshContext
from nemo_dist.mesh.rank_group import RankGroup
from nemo_dist.planning.mesh_plan import Role
from nemo_dist.plugin.hook_caller import PluginCalls
from nemo_dist.plugin.hookspecs import PluginState


@attrs.frozen(kw_only=True, eq=False, slots=False)
class ShardedModel:
    """The local ``parts`` of a model on its ``mesh``, and the hook ``calls`` that convert to the canonical state.

    ``strategy`` is the name of the strategy; ``plugins`` maps the names of all plugins to their import packages;
    ``states`` is what each plugin saves in checkpoints; ``differing`` are the plugins whose replicas differ by design;
    ``planner`` keeps the plan of the last save.
    """

    parts: Sequence[nn.Module]
    mesh: MeshContext
    calls: PluginCalls
    strategy: str | None = None
    plugins: Mapping[str, str] = attrs.field(factory=dict)
    states: Mapping[str, PluginState] = attrs.field(factory=dict)
    differing: Sequence[str] = ()
    planner: Planner = attrs.field(factory=Planner)

    @cached_property
    def model(self) -> Any:
        """The transformers model in the first part, which has the class and config of the whole model."""
        return inner_model(self.parts[0])

    @property
    def kind(self) -> str:
        """The name of the model's class."""
        return class_name(self.model)

    @property
    def ranks(self) -> RankGroup:
        """The ranks that save and load together."""
        return RankGroup.of(self.mesh)

    @property
    def batches(self) -> int:
        """The number of different batches in a step."""
        return self.mesh.size(Role.BATCH)

    @property
    def batch(self) -> int:
        """The data-parallel coordinate of this rank: which of those batches it reads."""
        return self.mesh.rank(Role.BATCH)

    @property
    def topology(self) -> dict[str, Any]:
        """The axes of size above 1 and the strategy, which together determine the shards of each rank."""
        return self.mesh.wide() | {"strategy": self.strategy}


class Holder(Protocol):
    """An object with a sharded model, such as a ``Runtime``."""

    @property
    def sharded(self) -> ShardedModel:
        """The sharded model."""
