"""Parameters that came to a model after it was loaded, as PEFT's adapters do: no strategy knows of them.

They are small, so they stay whole on every rank; only their gradients need a collective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nemo_dist.plugin.hookspecs import RuntimePart
from nemo_dist.plugin.registry import Registry

if TYPE_CHECKING:
    from nemo_dist.setup.setup import DistributedSetup

FEATURE = "adapters"  # what a strategy lists in ``composes_with`` when it is proven with them
_LOADED = "loaded_by_nemo_dist"


def mark_loaded(parts: Iterable[nn.Module]) -> None:
    """Mark the parameters of *parts*, so that those added later can be told from them."""
    for part in parts:
        for parameter in part.parameters():
            setattr(parameter, _LOADED, True)


def adapted(part: nn.Module) -> nn.Module:
    """Return the transformers model in *part*, which is that, or PEFT's wrapper of it.

    Raises ValueError for adapters that lengthen the sequence, because a loss is then a mean over more labels.
    """
    config: Any = getattr(part, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        raise ValueError(
            f"{type(config).__name__} adds tokens of its own to every sequence, so ranks and batches cannot be "
            "weighted by their labels; use adapters within the model's layers, LoRA for one"
        )
    within: Any = getattr(part, "get_base_model", None)
    return within() if callable(within) else part


def adapters(setup: DistributedSetup, parts: Sequence[nn.Module]) -> list[RuntimePart]:
    """Make the trainable parameters added to *parts* equal on all ranks, and average their gradients from now on.

    Collective over the mesh when there are any; otherwise the answer is empty. Raises ValueError where they are not
    proven to train like on one process.
    """
    added = {
        name: parameter
        for part in parts
        for name, parameter in part.named_parameters()
        if parameter.requires_grad and not hasattr(parameter, _LOADED)
    }
    if not added:
        return []
    _refuse(setup, added)
    group = setup.mesh_context.group("dp_cp")
    if group is None:
        return []
    replicas = _Replicas(list(added.values()), group)
    replicas.start()
    return [RuntimePart(no_sync=replicas.unsynchronised)]


def _refuse(setup: DistributedSetup, added: dict[str, nn.Parameter]) -> None:
    some = f"{len(added)} trainable parameters were added after loading ({next(iter(added))}, ...)"
    for axis in ("tp", "cp", "pp", "ep", "dp_replicate"):
        size = getattr(setup.mesh_context, f"{axis}_size")
        if size > 1:
            raise ValueError(f"{some}; this is not proven with {axis} (got {axis}_size={size}), leave it at 1")
    if setup.strategy is not None and FEATURE not in setup.strategy.composes_with:
        others = " or ".join(map(repr, Registry().composing(FEATURE)))
        raise ValueError(f"{some}; this is not proven with {setup.strategy.name!r}, use {others}")
    if any(isinstance(parameter, DTensor) for parameter in added.values()):
        raise ValueError(f"{some} as DTensors; add them as plain tensors, whole on every rank")


@attrs.define(eq=False)
class _Replicas:
    parameters: Sequence[nn.Parameter]
    group: dist.ProcessGroup
    _synchronised: bool = True
    _due: bool = False

    def start(self) -> None:
        _together(self.parameters, lambda values: dist.broadcast(values, group_src=0, group=self.group))
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(self._arrived)

    @contextmanager
    def unsynchronised(self) -> Iterator[None]:
        self._synchronised = False
        try:
            yield
        finally:
            self._synchronised = True

    def _arrived(self, _: Tensor) -> None:
        if self._synchronised and not self._due:
            self._due = True
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._average)  # at the end of this backward, as FSDP2 does

    def _average(self) -> None:
        """Average what has accumulated: of an earlier backward's average, the average is itself."""
        self._due = False
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        _together(gradients, lambda values: dist.all_reduce(values.div_(self.group.size()), group=self.group))


@torch.no_grad()
def _together(tensors: Sequence[Tensor], collective: Callable[[Tensor], object]) -> None:
    """Run *collective* in place on one vector of all *tensors*."""
    vector = torch.cat([tensor.reshape(-1) for tensor in tensors])
    collective(vector)
    for tensor, values in zip(tensors, vector.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(values.view_as(tensor))
