"""Count the tokens that are routed to every expert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_dist import Role
from nemo_dist.plugin.sharding_override import sharding_overrides

if TYPE_CHECKING:
    from nemo_dist.mesh.mesh_context import MeshContext


@attrs.frozen(eq=False)
class ExpertLoad:
    """How many tokens each expert of each local layer got in training since the last report.

    ``counts``: [experts], one tensor per layer.
    """

    mesh: MeshContext
    counts: dict[nn.Module, Tensor] = attrs.field(factory=dict)

    @classmethod
    def watch(cls, parts: list[nn.Module], mesh: MeshContext) -> ExpertLoad:
        """Start counting, in the forward of every layer of experts in *parts*."""
        load = cls(mesh)
        for part in parts:
            for module in sharding_overrides(part):
                experts = int(getattr(module, "num_experts", 0)) * mesh.size("ep")
                if experts:
                    load.counts[module] = torch.zeros(experts, device=mesh.device)
                    module.register_forward_pre_hook(load._count, with_kwargs=True)
        return load

    def metrics(self) -> Mapping[str, float]:
        """Return ``expert_load_max_over_mean``, the worst over all layers, and reset the counts; 1 is perfect balance.

        Collective: counts are summed over the ranks of ``dp_cp``, which route different tokens, and the worst is taken
        over those of ``pp``, which have other layers.
        """
        worst = torch.zeros((), device=self.mesh.device)
        for counts in self.counts.values():
            group = self.mesh.group(Role.TOKENS)
            if group is not None:
                dist.all_reduce(counts, group=group)
            worst = torch.maximum(worst, counts.max() / counts.mean().clamp(min=torch.finfo(counts.dtype).tiny))
            counts.zero_()
        stages = self.mesh.group(Role.LAYERS)
        if stages is not None:
            dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=stages)
        return {"expert_load_max_over_mean": worst.item()}

    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return  # an evaluation is not what a step is measured by
        chosen = (args[1] if len(args) > 1 else kwargs["top_k_index"]).reshape(-1)
        ones = torch.ones_like(chosen, dtype=torch.float32)
        self.counts[module].scatter_add_(0, chosen, ones)
