"""Activation checkpointing: keep fewer activations, and recompute layers during the backward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import attrs

from nemo_dist import Stage, hookimpl
from nemo_dist.hf_model import inner_model
from nemo_dist_recompute.config import RecomputeConfig

if TYPE_CHECKING:
    from torch import nn

_KEEPS = {
    "full": "only the inputs of every layer are kept",
    "selective": "attention, collectives and every second matmul are kept, the rest is recomputed",
}

__all__ = ["Recompute", "RecomputeConfig"]


@attrs.frozen(eq=False)
class Recompute:
    """Recompute layers during the backward; gradients are bit for bit the same."""

    name: ClassVar[str] = "recompute"
    config_type: ClassVar[type] = RecomputeConfig
    stage: ClassVar[int] = Stage.RECOMPUTE
    axes: ClassVar[frozenset[str]] = frozenset()
    composes_with: ClassVar[frozenset[str]] = frozenset()

    config: RecomputeConfig = attrs.field(factory=RecomputeConfig)

    @property
    def features(self) -> Mapping[str, str]:
        """What other plugins may not be proven with: the selective mode."""
        selective = {"activation_checkpointing:selective": "activation_checkpointing='selective'"}
        return selective if self.config.mode == "selective" else {}

    @hookimpl
    def shard(self, parts: list[nn.Module]) -> None:
        from nemo_dist_recompute.apply import recompute

        for part in parts:
            recompute(inner_model(part), self.config)

    @hookimpl
    def memory(self, model: nn.Module) -> None:
        from nemo_dist_recompute.apply import recomputable

        recomputable(model)  # raises where there is nothing to recompute; what is kept is counted in a trace

    @hookimpl
    def explain(self, model: nn.Module | None) -> str:
        scope = "" if self.config.scope == ("all",) else f" in the {' and '.join(self.config.scope)} layers"
        layers = ""
        if model is not None:
            from nemo_dist_recompute.apply import kinds

            layers = f" of {kinds(model)}"
        return f"recompute ({self.config.mode}){layers}: {_KEEPS[self.config.mode]}{scope}"
