"""The values of a setup: a plan, the plugins selected for it in stage order, and how it is to run."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import attrs

from nemo_dist.errors import RankError
from nemo_dist.planning.mesh_plan import MeshPlan
from nemo_dist.planning.sizes import ParallelismSizes
from nemo_dist.planning.validation import shown
from nemo_dist.plugin.hook_caller import PluginCalls
from nemo_dist.plugin.protocol import Plugin, claimant, strategy_of


def in_order(plugins: Iterable[Plugin]) -> tuple[Plugin, ...]:
    """Return *plugins* sorted by stage, then by name: the order in which they act on a model."""
    return tuple(sorted(plugins, key=lambda plugin: (plugin.stage, plugin.name)))


@attrs.frozen(kw_only=True, eq=False, slots=False)
class Composition:
    """The values of a setup; ``plugins`` are in the order in which they act on the model.

    ``activation_checkpointing``: as it was asked for; ``recompute_mode`` says what it means. ``ranks``: those of the
    mesh; None is all. ``timeout_minutes``: the timeout of every collective; None is the process group's.
    """

    plan: MeshPlan
    plugins: tuple[Plugin, ...] = attrs.field(converter=in_order)
    parallelism_sizes: ParallelismSizes
    activation_checkpointing: str | bool = False
    device_type: str | None = None
    timeout_minutes: float | None = None
    ranks: tuple[int, ...] | None = None

    def place_of(self, rank: int) -> int:
        """Return the place in the plan of the process *rank*; raise RankError for one that ``ranks`` leaves out."""
        if self.ranks is None:
            return rank
        if rank not in self.ranks:
            given = shown(list(self.ranks))
            raise RankError(f"rank {rank} is none of the ranks of this setup, {given}; name one of them")
        return self.ranks.index(rank)

    @cached_property
    def calls(self) -> PluginCalls:
        """Calls the hooks of the selected plugins only."""
        return PluginCalls(self.plugins)

    @property
    def strategy(self) -> Plugin | None:
        """The selected strategy; None only when the setup wraps a mesh whose ranks all see the same tokens."""
        return strategy_of(self.plugins)

    @property
    def strategy_config(self) -> Any:
        """The config of the selected strategy."""
        return self.strategy.config if self.strategy else None

    @property
    def pipeline_config(self) -> Any:
        """The config of the plugin that claims ``pp``; None when the size of ``pp`` is 1."""
        return self._config_of("pp", self.parallelism_sizes.pp_size)

    @property
    def moe_parallel_config(self) -> Any:
        """The config of the plugin that claims ``ep``; None when the size of ``ep`` is 1."""
        return self._config_of("ep", self.parallelism_sizes.ep_size)

    @property
    def recompute_mode(self) -> str | None:
        """The mode of activation checkpointing: "full" (asked for as True or by name), "selective" or None."""
        asked = self.activation_checkpointing
        return "full" if asked is True else str(asked) if asked else None

    def _config_of(self, axis: str, size: int) -> Any:
        found = claimant(self.plugins, axis) if size > 1 else None
        return found.config if found else None

    def describe(self) -> dict[str, str]:
        """Return, as text, the fields that must be equal on every rank, including those from ``agree`` hooks."""
        fields = {
            "parallelism_sizes": repr(self.parallelism_sizes),
            "plan": repr(self.plan),
            "plugins": ", ".join(plugin.name for plugin in self.plugins),
            "activation_checkpointing": repr(self.recompute_mode),
            "device_type": repr(self.device_type),
            "timeout_minutes": repr(self.timeout_minutes),
            "ranks": repr(self.ranks),
        }
        fields |= {f"{plugin.name} config": repr(plugin.config) for plugin in self.plugins}
        for found in self.calls.agree(plan=self.plan):
            fields |= found
        return fields
