"""What saving, loading and exporting need to know of a sharded model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import attrs
from torch import nn

from nemo_dist.hf_model import class_name, inner_model
from nemo_dist.mesh.mesh_context import MeshContext
from nemo_dist.mesh.rank_group import RankGroup
from nemo_dist.planning.mesh_plan import Role
from nemo_dist.plugin.hook_caller import PluginCalls
from nemo_dist.plugin.hookspecs import PluginState


@attrs.frozen(kw_only=True, eq=False, slots=False)
class ShardedModel:
    """The local ``parts`` of a model on its ``mesh``, and the ``calls`` that map its layout to the canonical one.

    ``strategy`` is the name of the strategy; ``plugins`` are the names of all plugins and the import package of each;
    ``states`` is what the plugins want to have in a checkpoint.
    """

    parts: Sequence[nn.Module]
    mesh: MeshContext
    calls: PluginCalls
    strategy: str | None = None
    plugins: Mapping[str, str] = attrs.field(factory=dict)
    states: Mapping[str, PluginState] = attrs.field(factory=dict)

    @cached_property
    def model(self) -> Any:
        """The transformers model in the first part: its class and config are those of the whole."""
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
        """Which of them is this rank's."""
        return self.mesh.rank(Role.BATCH)

    @property
    def topology(self) -> dict[str, Any]:
        """The sizes of the axes with more than one rank, which say who has which part, and the strategy."""
        return self.mesh.wide() | {"strategy": self.strategy}


class Holder(Protocol):
    """Whatever holds a sharded model, as a ``Runtime`` does."""

    @property
    def sharded(self) -> ShardedModel:
        """The model, and how it is sharded."""
