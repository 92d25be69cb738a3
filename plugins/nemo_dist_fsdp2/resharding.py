"""Put the shards of a model back that FSDP2 left gathered."""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from nemo_dist.mesh.dtensor import parameter_slots


@attrs.define(eq=False)
class Resharding:
    """Put the shards of *model* back, with what was frozen or thawed on the gathered parameters in between.

    FSDP2 leaves some groups gathered after the forward (norm and head, all groups with ``reshard_after_forward=False``,
    or on fewer ranks), because a backward mostly follows and frees them.
    """

    model: nn.Module
    modules: list[FSDPModule]
    slots: list[tuple[dict[str, Any], str]]  # the dict of a module's own parameters, and a name in it
    trained: list[bool] = attrs.field(init=False)
    gathered: bool = False  # every group, at least once
    started: bool = False  # FSDP2 finds its root in the first forward, and cannot reset before

    @classmethod
    def of(cls, model: nn.Module) -> Resharding:
        """Return that of *model*, which FSDP2 has sharded."""
        modules: list[FSDPModule] = [module for module in model.modules() if isinstance(module, FSDPModule)]
        found = cls(model, modules, [(module._parameters, slot) for _, module, slot, _ in parameter_slots(model)])
        model.register_forward_pre_hook(found._leave_inference_mode, prepend=True)
        model.register_forward_pre_hook(found._start)  # after FSDP2's own
        return found

    def __attrs_post_init__(self) -> None:
        self.trained = [parameter.requires_grad for parameter in self._parameters()]

    def __call__(self) -> None:
        """Put the shards back."""
        found = self._parameters()
        reset: Any = getattr(self.model, "reset_iter_state", None)
        if self.started and reset is not None:
            # Also for a group of several modules of which a forward ran only some, and for one that an error cut short.
            reset()
        else:
            for module in self.modules:
                module.reshard()
        shards = self._parameters()
        for shard, gathered, trained in zip(shards, found, self.trained, strict=True):
            if shard is not gathered and gathered.requires_grad != trained:
                shard.requires_grad_(gathered.requires_grad)
        self.trained = [shard.requires_grad for shard in shards]

    def gather(self) -> None:
        """Gather the parameters of all groups."""
        for module in self.modules:
            module.unshard()

    def _start(self, *_: Any) -> None:
        self.started = True

    def _leave_inference_mode(self, *_: Any) -> None:
        """Make the tensors that FSDP2 gathers into, and keeps, before a first forward in inference mode would.

        No backward could use those. All ranks that share the parameters take part, as in the forward.
        """
        if not self.gathered and torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():
                for module in self.modules:
                    module.unshard()
                    module.reshard()
        self.gathered = True

    def _parameters(self) -> list[nn.Parameter]:
        return [own[slot] for own, slot in self.slots]
