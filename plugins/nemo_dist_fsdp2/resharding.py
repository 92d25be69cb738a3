"""Put the shards of a model back that FSDP2 left gathered."""

from __future__ import annotations

import operator
from typing import Any

import attrs
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from nemo_dist.mesh.dtensor import parameter_slots
from nemo_dist.torch_private import gradient_hooks
from nemo_dist_fsdp2.groups import Place, cast, groups_of, initialise, share_padding, strangers
from nemo_dist_fsdp2.lost_edits import LostEdits


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
    seen: list[Any] = attrs.field(factory=list)  # the shards that were judged last, and the dtype of one
    gathered: bool = False  # every group, at least once
    started: bool = False  # FSDP2 finds its root in the first forward, and cannot reset before
    groups: list[Any] = attrs.field(factory=list)
    edits: LostEdits = attrs.field(init=False)

    @classmethod
    def of(cls, model: nn.Module, compiled: bool) -> Resharding:
        """Return that of *model*, which FSDP2 has sharded, and whose blocks may be *compiled*."""
        modules: list[Any] = [module for module in model.modules() if isinstance(module, FSDPModule)]
        found = cls(model, modules, [(module._parameters, slot) for _, module, slot, _ in parameter_slots(model)])
        found.groups = groups_of(model)
        share_padding(found.groups)
        # A class of its own for what is gathered would have a compiled block leave its graph.
        found.edits = LostEdits(found.groups, of_data=not compiled)
        for module in modules:
            if module is not model:
                module.register_forward_pre_hook(found._start_inside, prepend=True)  # before FSDP2's own
        model.register_forward_pre_hook(found._leave_inference_mode, prepend=True)
        model.register_forward_pre_hook(_judge_compilation, prepend=True)
        model.register_forward_pre_hook(found._start)  # after FSDP2's own
        model.register_forward_hook(found.edits.left_by_forward, always_call=True)
        return found

    def __attrs_post_init__(self) -> None:
        self.trained = [parameter.requires_grad for parameter in self._parameters()]

    def __call__(self) -> None:
        """Put the shards back."""
        found = self._parameters()
        lost = self.edits.of_gathered()
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
        self._judge_edits(lost, shards)
        # A forward without gradients comes here twice for each token of ``generate``, and may not look at all of them.
        seen = [*shards, *(one.dtype for one in shards[:1])]
        same = len(seen) == len(self.seen) and all(map(operator.is_, seen, self.seen))
        if torch.is_grad_enabled() or not same:
            self._judge([*(one for one, shard in zip(found, shards, strict=True) if one is not shard), *shards])
            self.seen = seen

    def _judge_edits(self, gathered: list[Place], shards: list[nn.Parameter]) -> None:
        """Raise RuntimeError where what was at the places *gathered* was changed, or ``data`` of *shards* assigned."""
        if gathered:
            raise RuntimeError(
                f"{self._named(gathered[:3])} was changed while gathered, after a forward without a backward, which "
                "fsdp2 would lose; change what runtime.named_parameters() gives"
            )
        if assigned := self.edits.of_shards(shards):
            names = [name for name, one in self.model.named_parameters() if any(one is other for other in assigned)]
            raise RuntimeError(
                f"the data of {', '.join(names[:3])} was assigned, which changes nothing in a shard; write "
                "p.data.copy_(value) in place of p.data = value"
            )

    def _judge(self, parameters: list[nn.Parameter]) -> None:
        """Raise RuntimeError for what a user did to *parameters* that would be lost."""
        if any(gradient_hooks(one)[0] for one in parameters):
            names = [name for name, one in self.model.named_parameters() if gradient_hooks(one)[0]]
            raise RuntimeError(
                f"{', '.join(names) or 'a gathered parameter'} has a hook of register_hook, which fsdp2 never calls, "
                "or with the gradient of one rank's rows; use register_post_accumulate_grad_hook on what "
                "runtime.named_parameters() gives, and find the shard of the whole gradient in .grad"
            )
        if not self.started:
            return
        if others := strangers(self.groups):
            raise RuntimeError(
                f"{self._named(others)} was replaced, or tied to another parameter, after the first forward, which "
                "fsdp2 would undo; do it before that, or save the model, change it in one process and load it again"
            )
        if changed := cast(self.groups):
            raise RuntimeError(
                f"{self._named(changed[:1])} and {len(changed) - 1} other parameters were cast after the first "
                "forward, and fsdp2 keeps the dtypes of that; cast before it, or load the model with dtype="
            )

    def _named(self, places: list[Place]) -> str:
        names = {module: name for name, module in self.model.named_modules()}
        return ", ".join(f"{names.get(module, 'a module')}.{name}".removeprefix(".") for module, name in places)

    def gather(self) -> None:
        """Gather the parameters of all groups."""
        for module in self.modules:
            module.unshard()

    def _start(self, *_: Any) -> None:
        self.started = True

    def _start_inside(self, *_: Any) -> None:
        """Let the first forward be that of a module inside of the model, which FSDP2 would take for the root."""
        if not self.started:
            initialise(self.model)
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


def _judge_compilation(*_: Any) -> None:
    if torch.compiler.is_compiling():
        _refuse_compilation()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _refuse_compilation() -> None:
    raise RuntimeError(
        "torch.compile of a whole model that fsdp2 shards is not proven to train like one process; leave it out, and "
        "have each block compiled by FSDP2Config(enable_compile=True)"
    )
