"""Keep what Megatron-FSDP's buffers hold of the gradients what the parameters show, as autograd would."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_dist.torch_private import hold_a_copy, writes_to
from nemo_dist_megatron_fsdp.row_layout import RowLayout

_DROP_ALL = "call optimizer.zero_grad(), of every optimizer, or model.zero_grad()"


def _references() -> int:
    """Return how many references Python counts of what is in a dict and in a variable of the function that asks."""
    places = {"": object()}
    held = places.get("")
    return sys.getrefcount(held)


_BY_NOBODY = _references() + 1  # of a gradient that is held by the package and by its own full_tensor


@attrs.define(kw_only=True, eq=False)
class Gradients:
    """The gradients of one model, by name of their parameter.

    The package adds a gradient to its part of a buffer, and shows that as ``grad`` of the shard when it is reduced.
    ``shown`` has what was shown, and its count of writes, so that another ``grad`` is known as the user's.
    """

    wrapper: Any
    layout: RowLayout
    shards: Mapping[str, Any]
    shown: dict[str, tuple[Any, int]] = attrs.field(factory=dict)
    used: set[str] = attrs.field(factory=set)  # to which this rank added since they were dropped
    waiting: set[str] = attrs.field(factory=set)  # to which it added what is not shown yet
    failed: set[str] = attrs.field(factory=set)  # of which a backward that failed may have left a part
    reduced: bool = False

    def watch(self) -> None:
        """Note from now on which parameters a backward reaches."""
        for name, raw in self.wrapper.raw_param.items():
            if raw.requires_grad:
                raw.register_hook(partial(self._take, name))

    def _take(self, name: str, gradient: Tensor) -> Tensor | None:
        """Note that a backward reached this parameter; add nothing to what was frozen after the package took over.

        The package does not know of it, and asserts that its parameters require gradients as they did before.
        """
        if not self.shards[name].requires_grad:
            return torch.zeros_like(gradient)
        self.used.add(name)
        self.waiting.add(name)
        return None

    def begin(self) -> None:
        """Prepare a backward: it adds to the gradients that the shards have now."""
        if any(self.shards[name].requires_grad for name in self.failed):
            raise RuntimeError(
                f"a backward failed in the middle, with gradients of some parameters only; {_DROP_ALL} before the next"
            )
        if self.reduced:
            held = [name for name, shard in self.shards.items() if shard.grad is not None]
            if not held:
                self.forget(self.shards)
            elif self.wrapper.data_parallel_sharding_strategy == "optim":
                raise RuntimeError(
                    f"ZeRO 1 has reduced the gradients of the last backward, that of {held[0]} for one, and would "
                    "reduce them again; call optimizer.zero_grad() first, or model.zero_grad() for parameters that the "
                    "optimizer does not have, or run all but the last backward under runtime.no_sync()"
                )
        for name, shard in self.shards.items():
            self._take_back(name, shard.grad)
        self.reduced = False

    def _take_back(self, name: str, gradient: Any) -> None:
        """Let the package add to *gradient*, where the user dropped, replaced or changed what was shown."""
        shown, count = self.shown.get(name, (None, 0))
        if gradient is None:
            if shown is not None:
                self.forget([name])
            return
        self.used.add(name)
        if gradient is not shown or writes_to(gradient) != count:
            self._put(name, gradient, replaced=gradient is not shown)
            self.shown[name] = gradient, writes_to(gradient)

    def _put(self, name: str, gradient: Any, replaced: bool) -> None:
        """Put *gradient* in the place of what the package has."""
        part = self._part(name)
        if part is None:
            return
        local, whole = gradient.to_local().flatten(), self.wrapper.data_parallel_sharding_strategy == "optim"
        own = self._part(name, shard=True) if whole else part
        if not replaced and local.data_ptr() == own.data_ptr():
            return
        if name in self.waiting:
            raise RuntimeError(
                f"the gradient of {name} was set or changed while that of a backward under runtime.no_sync() waits, of "
                "which .grad shows nothing; change gradients after a backward outside of no_sync()"
            )
        self._let_go(name)
        if whole:  # the reduction takes the mean over the ranks
            part.zero_()
            local = local * self.layout.mesh.size(0)
        own.copy_(local)

    def _part(self, name: str, shard: bool = False) -> Any:
        """Return where the package adds up a gradient, flat; None for what it took over frozen.

        That is this rank's shard, or, with ZeRO 1, the whole; then *shard* asks for this rank's part of it.
        """
        raw, buffer = self.wrapper.raw_param[name], self.wrapper.param_and_grad_buffer
        gradients = buffer.parameter_groups[buffer.param_to_param_group[raw]].main_grad_buffer
        return None if gradients is None else gradients.get_item(gradients.param_idx[raw], only_shard=shard)

    def forget(self, names: Iterable[str]) -> None:
        """Empty what the package has of these gradients, which were dropped, or set to zero."""
        for name in names:
            self.shown.pop(name, None)
            part = self._part(name)
            if part is not None:
                self._let_go(name)
                part.zero_()
            if self.shards[name].grad is None:
                self.used.discard(name)
            self.waiting.discard(name)
            self.failed.discard(name)
        self.reduced = self.reduced and bool(self.shown)

    def _let_go(self, name: str) -> None:
        """Give whoever holds a gradient that was dropped its own copy: the package writes the next one over it."""
        shown = self.wrapper.param_and_grad_buffer.dist_main_grad
        held = shown.get(name)
        if held is not None and held is not self.shards[name].grad and sys.getrefcount(held) > _BY_NOBODY:
            hold_a_copy(held)
            del shown[name]

    def fail(self) -> None:
        """Note that a backward failed: it added to any of the gradients, or to none."""
        self.failed = {name for name, raw in self.wrapper.raw_param.items() if raw.requires_grad}
        for raw in self.wrapper.raw_param.values():
            raw.grad = None

    def unreduced(self) -> dict[Any, Callable[[], None]]:
        """Return the shards whose gradients are not shown, or that a failed backward left, each with its drop."""
        names = self.waiting | self.failed
        return {shard: partial(self.forget, [name]) for name, shard in self.shards.items() if name in names}

    def settle(self) -> None:
        """Set an empty gradient on shards without rows, and None on parameters that were not used, as on one process.

        The package does the opposite, and does not know of parameters that were frozen after it took over.
        All data-parallel ranks take part: whether a parameter was used on any of them decides.
        """
        names = list(self.shards)
        trained = [name in self.used for name in names]
        used = torch.tensor(trained, dtype=torch.uint8).to(self.wrapper.device, non_blocking=True)
        if self.layout.group is not None:
            dist.all_reduce(used, op=dist.ReduceOp.MAX, group=self.layout.group)
        for name, took_part in zip(names, used.tolist(), strict=True):
            shard = self.shards[name]
            if not took_part:
                shard.grad = None
            elif shard.grad is None:
                shard.grad = torch.zeros_like(shard)
            if shard.grad is not None:
                self.layout.correct(name, shard.grad)
                self.shown[name] = shard.grad, writes_to(shard.grad)
        self.waiting.clear()
        self.reduced = True
