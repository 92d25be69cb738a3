"""Install the forwards of a plan's styles in a model, or in a single module of it when a plan is being proven."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import attrs
from torch.distributed.tensor import Placement

from nemo_dist.mesh.dtensor import local
from nemo_dist_tensor import layers, parameter_sharding
from nemo_dist_tensor.attention_heads import AttentionHeads
from nemo_dist_tensor.collectives import Peers
from nemo_dist_tensor.installed import Installed, remember
from nemo_dist_tensor.parallel_regions import Region
from nemo_dist_tensor.styles import COLUMN, ROW, SUMMED
from nemo_dist_tensor.tp_plan import Rules, is_key_value


@attrs.frozen(eq=False, slots=False)
class Installer:
    """The *rules* of the module *model*, for the ranks *peers*; ``config`` is that of the whole model."""

    model: Any
    config: Any
    rules: Rules
    peers: Peers

    def _module(self, name: str) -> Any:
        return self.model.get_submodule(name)

    @cached_property
    def whole_keys(self) -> Mapping[str, AttentionHeads]:
        """The key and value projections that every rank keeps whole, with the heads of their attention."""
        found = {}
        for name, style in self.rules.modules.items():
            if style == "colwise" and is_key_value(name):
                heads = AttentionHeads.of(self._module(name.rpartition(".")[0]), self.peers.size)
                if heads is not None and heads.whole_keys:
                    found[name] = heads
        return found

    def placements(self) -> dict[str, Placement | None]:
        """Return how every parameter that a rule names is sharded; None leaves it whole."""
        placements: dict[str, Placement | None] = {}
        for name, style in self.rules.modules.items():
            module = self._module(name)
            for parameter, _ in module.named_parameters(recurse=False):
                cut = None if name in self.whole_keys else parameter_sharding.of_module(module, style, parameter)
                placements[f"{name}.{parameter}" if name else parameter] = cut
        for name, style in self.rules.parameters.items():
            placements[name] = parameter_sharding.of_parameter(style, self.model.get_parameter(name))
        return placements

    def install(self, regions: Mapping[str, Region], state: layers.LMHead | None = None) -> None:
        """Replace the forwards of all modules with a rule; the head of a model with *state* may keep its logits cut."""
        for name, style in self.rules.modules.items():
            region = regions.get(name) or Region(name, self.peers, None, None)
            self._install(name, style, region, state)
        by_module: dict[str, set[str]] = {}
        for name, style in self.rules.parameters.items():
            if style in SUMMED:
                module, _, own = name.rpartition(".")
                by_module.setdefault(module, set()).add(own)
        for name, parameters in by_module.items():
            layers.summed(self._module(name), self.peers, parameters)
            remember(self._module(name), Installed(next(iter(SUMMED)), Region(name, self.peers, None, None)))
        for name, attributes in self.rules.divided.items():
            module = self._module(name)
            for attribute in attributes:
                setattr(module, attribute, getattr(module, attribute) // self.peers.size)

    def _install(self, name: str, style: str, region: Region, state: layers.LMHead | None) -> None:
        module = self._module(name)
        heads = self.whole_keys.get(name)
        rows = None if heads is None else layers.of_heads(heads, region.peers)
        kept = state if state is not None and module is self.model.get_output_embeddings() else None
        remember(module, Installed(style, region, kept, rows))
        if kept is not None:
            layers.head(module, region, kept)
        elif style in COLUMN:
            layers.column(module, style, region, rows or local)
            if heads is not None:
                self._module(name.rpartition(".")[0]).num_key_value_groups = heads.local_groups(self.peers.rank)
        elif style in ROW:
            layers.row(module, name, style, region)
        elif style == "embedding_rowwise":
            layers.vocabulary(module, self.peers)
        elif style == "embedding_colwise":
            layers.features(module, self.peers)
        elif style in SUMMED:
            layers.summed(module, self.peers)
        elif style == "moe_tp_experts":
            layers.experts(module, self.peers)
        elif style == "mla_kv_a_proj":
            layers.latent(module, self.config.get_text_config().qk_rope_head_dim, self.peers)
        elif style == "local_params":
            layers.local_only(module)
