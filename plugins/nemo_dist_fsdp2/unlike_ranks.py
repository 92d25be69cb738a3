"""Keep ranks that use different parameters of a model in a step, or none of some, with the gradients of one process.

FSDP2 sums flat buffers of the gradients that a rank has, so ranks that have those of different parameters would sum
them with each other. Here every rank sends zeros for what it did not use, and what no rank used has no gradient after
the backward, as on one process. Which groups ranks gather and reduce must be the same on all of them, and is compared.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from nemo_dist.errors import RankError
from nemo_dist.hf_model import is_own_code
from nemo_dist.mesh.mesh_context import MeshContext
from nemo_dist.mesh.process_group import has_cpu_backend
from nemo_dist.planning.mesh_plan import Role
from nemo_dist.torch_private import assert_on_device, run_gradient_hooks, without_gradient_hooks
from nemo_dist_fsdp2.backwards import Backwards, refuse_changed_weights
from nemo_dist_fsdp2.groups import (
    agree_before_collectives,
    align_dtypes,
    around_backwards,
    around_reductions,
    compare_weights,
    gather_before_each_backward,
    give_zeros,
    groups_of,
    has_gradient,
    trained,
)

_UNLIKE = (
    "ranks run different modules of a model that FSDP2 gathers one by one, and they must run the same ones in the same "
    "order; run those whose outputs a rank does not need too, and multiply them by 0, or use 'ddp'"
)
_ORDER = 1 << 30  # more than the number of an order of groups


@attrs.define(eq=False)
class Gradients:
    """The gradients of *groups* in one backward, which the ranks of ``ranks`` (None: this one alone) reduce together.

    ``used``: the shards of parameters that have one on this rank; ``before``: for each shard, whether it had one before
    (several parameters of groups have one shard where loading tied them). ``order``: the numbers of the groups in the
    order in which they were reduced.
    """

    groups: list[Any]
    ranks: dist.ProcessGroup | None
    device: torch.device
    compared: bool  # whether ranks compare what they do before they do it
    in_step: bool  # whether they do as many forwards and backwards; a pipeline does one for each of its microbatches
    used: set[nn.Parameter] = attrs.field(factory=set)
    before: dict[nn.Parameter, bool] = attrs.field(factory=dict)
    order: list[int] = attrs.field(factory=list)

    @classmethod
    def watch(cls, model: nn.Module, mesh: MeshContext) -> None:
        """Keep those of *model*, which FSDP2 has sharded, right; its ranks compare what they do where own code chooses.

        Comparing takes the hosts a message for each group, so it is left out where no own code runs several groups.
        """
        ranks = mesh.group(Role.TOKENS)
        compared = ranks is not None and _chooses(model) and has_cpu_backend()
        found = cls(groups_of(model), ranks, mesh.device, compared, in_step=mesh.size(Role.LAYERS) == 1)
        for index, group in enumerate(found.groups):
            around_reductions(group, partial(found.reduce, index))
            if compared:
                agree_before_collectives(group, found.agree)
        backwards = Backwards(model, found.forget)
        around_backwards(model, backwards.begin, backwards.end)
        around_backwards(model, refuse_graph, found.settle)
        compare_weights(model, refuse_changed_weights)
        gather_before_each_backward(model)
        model.register_forward_pre_hook(found.forget)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.register_forward_pre_hook(backwards.recover_before_forward, prepend=True)
        if compared and found.in_step:
            model.register_forward_hook(lambda *_: found.agree("has run the model"))

    def agree(self, what: str) -> None:
        """Raise RankError where the ranks do not all say *what* they do now; all take part."""
        own = torch.tensor([zlib.crc32(what.encode())], dtype=torch.int64, device="cpu")
        if type(own) is not Tensor:  # a rehearsal without values
            return
        both = torch.cat([own, -own])
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=self.ranks)
        if both[0] != -both[1]:
            raise RankError(f"{_UNLIKE} (rank {dist.get_rank()} now {what})")

    def reduce(self, index: int, reduce: Callable[..., None]) -> None:
        """Reduce the group *index*: with zeros for parameters that only other ranks may have used.

        Users' hooks of gradients wait until it is known which ones those are.
        """
        group = self.groups[index]
        parameters = trained(group) if group.reduce_grads else []
        for one in parameters:
            self.before.setdefault(one.sharded_param, one.sharded_param.grad is not None)
            if has_gradient(one):
                self.used.add(one.sharded_param)
            elif self.ranks is not None:
                give_zeros(one)
        align_dtypes(parameters)
        if parameters:
            self.order.append(index)
        with without_gradient_hooks(_shards(parameters) if self.ranks is not None else ()):
            reduce()

    def settle(self) -> None:
        """Take the gradients of parameters that no rank used away, and call the hooks of the others.

        All ranks take part where they reduced any.
        """
        if self.compared and self.in_step:
            self.agree("is done with a backward")
        if not self.order:
            return
        shards = _shards(one for group in self.groups for one in trained(group))
        used = self._used_anywhere([shard in self.used for shard in shards])
        for shard, by_any in zip(shards, used, strict=True):
            if not by_any and self.before.get(shard) is False:
                shard.grad = None
            if by_any and shard in self.before and self.ranks is not None:
                run_gradient_hooks(shard)
        self.forget()

    def forget(self, *_: Any) -> None:
        """Forget the backward, also one that an error cut short."""
        self.used.clear()
        self.before.clear()
        self.order.clear()

    def _used_anywhere(self, here: list[bool]) -> list[bool]:
        """Return for each parameter whether any rank used it; raise where ranks reduced groups in different orders.

        The host waits for a device only where this rank left out some parameter.
        """
        if self.ranks is None:
            return here
        order = zlib.crc32(repr(self.order).encode()) % _ORDER
        told = torch.tensor([*here, order, -order], dtype=torch.int32, device="cpu").to(self.device, non_blocking=True)
        dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self.ranks)
        if type(told) is not Tensor:
            return here
        same = told[-2] == -told[-1]
        if self.device.type != "cpu":
            assert_on_device(same, _UNLIKE)
        elif not same:
            raise RankError(_UNLIKE)
        return here if all(here) else [bool(one) for one in told[:-2].tolist()]


def _chooses(model: nn.Module) -> bool:
    """Whether own code of *model* chooses which groups run: that of a module with groups inside of it.

    A kernel for a norm or a feed-forward only chooses among the parameters of its own group.
    """
    own = (module for module in model.modules() if is_own_code(module))
    return any(isinstance(inner, FSDPModule) for module in own for inner in module.modules() if inner is not module)


def _shards(parameters: Iterable[Any]) -> list[nn.Parameter]:
    """Return the shards of *parameters* of groups, each once."""
    return list(dict.fromkeys(one.sharded_param for one in parameters))


def refuse_graph() -> None:
    """Raise RuntimeError in a backward that records gradients, to differentiate them once more."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "a backward with create_graph=True is to be differentiated once more, and FSDP2 frees the parameters that "
            "this would read; use 'ddp', with cp_size=1 and tp_size=1"
        )
