"""Drive Megatron-FSDP in a training step, through hooks on the transformers model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import attrs
import torch
import torch.distributed as dist
from megatron_fsdp import fully_shard_optimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from nemo_dist.mesh.dtensor import parameter_slots
from nemo_dist.torch_private import changes_in_place, gradient_hooks, run_after_backward, tensors_in
from nemo_dist_megatron_fsdp.row_layout import RowLayout

_ENGINE = "_nemo_dist_megatron_fsdp"  # key in the model's __dict__, so that the engine is no submodule


@attrs.define(kw_only=True, eq=False)
class Engine:
    """The package's wrapper of one model, and the state of its current gradients.

    The wrapper's own forward only swaps the shards, which the optimizer and the user see, for the parameters that the
    model computes with. Hooks on the model do the same, so the model needs no wrapping. Outside of a forward and a
    backward the parameters of the model are its shards, and their ``grad`` the shards of the gradients.
    """

    wrapper: Any
    layout: RowLayout
    shards: dict[str, Any]
    slots: list[tuple[str, dict[str, Any], str, Any]]  # a name, the dict of a module's own parameters, its name there
    used: set[str] = attrs.field(factory=set)  # whose gradients this rank added to since they were dropped
    shown: dict[str, tuple[Any, int]] = attrs.field(factory=dict)  # the gradients as they were set, and their changes
    synchronise: bool = True
    in_backward: bool = False
    reduced: bool = False
    installed: int = -1
    stale: bool = True

    @classmethod
    def start(cls, model: nn.Module, wrapper: Any, layout: RowLayout) -> None:
        """Attach an engine to *model*."""
        slots = [(name, module._parameters, slot, one) for name, module, slot, one in parameter_slots(model)]
        engine = cls(wrapper=wrapper, layout=layout, shards=dict(model.named_parameters()), slots=slots)
        model.__dict__[_ENGINE] = engine
        for name, shard in engine.shards.items():
            layout.correct(name, shard)
        model.register_forward_pre_hook(engine._before_forward, prepend=True)
        model.register_forward_hook(engine._after_forward)
        for name, raw in wrapper.raw_param.items():
            if raw.requires_grad:
                raw.register_hook(partial(engine._take, name))

    def _take(self, name: str, gradient: Tensor) -> Tensor | None:
        """Note that a backward reached this parameter; add nothing to what was frozen after the package took over.

        The package does not know of it, and asserts that its parameters require gradients as they did before.
        """
        if not self.shards[name].requires_grad:
            return torch.zeros_like(gradient)
        self.used.add(name)
        return None

    @staticmethod
    def of(model: nn.Module) -> Engine:
        """Return the engine of *model*."""
        engine: Engine = model.__dict__[_ENGINE]
        return engine

    def _before_forward(self, model: nn.Module, args: Any) -> None:
        self.in_backward = False  # a backward that failed leaves it True
        self._refuse_thawed()
        self._refuse_lost()
        self._install_changed_weights()
        self.wrapper._replace_param_with_raw_if_needed()

    def _refuse_thawed(self) -> None:
        """Refuse to train what was frozen when the package took over: it has no buffer for such gradients."""
        raw = self.wrapper.raw_param
        thawed = [name for name, shard in self.shards.items() if shard.requires_grad and not raw[name].requires_grad]
        if thawed:
            raise RuntimeError(
                f"{', '.join(thawed)}: frozen when megatron_fsdp took the model over, so the package makes no "
                "gradients here; leave them frozen, or use 'fsdp2'"
            )

    def _refuse_lost(self) -> None:
        """Refuse what the package would undo or never call: other parameters in its modules, and hooks of gradients."""
        self.wrapper._replace_param_with_distributed_if_needed()  # a forward that failed leaves the others
        if others := [name for name, own, slot, shard in self.slots if own.get(slot) is not shard]:
            raise RuntimeError(
                f"{', '.join(others)} was replaced, or tied to another parameter, after megatron_fsdp took the model "
                "over, which the package would undo; save the model, change it and load it again"
            )
        if hooked := [name for name, shard in self.shards.items() if any(gradient_hooks(shard))]:
            raise RuntimeError(
                f"{', '.join(hooked)} has a hook of its gradient, which megatron_fsdp never calls; change .grad of "
                "runtime.named_parameters() between the backward and optimizer.step()"
            )

    def _install_changed_weights(self) -> None:
        """Copy changed shards to the parameters of the forward; the package notices only its own optimizer steps."""
        if self._edits() != self.installed:
            self.wrapper.install_optimized_model_weights()
            self.stale = True
        if self.stale:
            self.wrapper.synchronize_param_gather()  # drops what a forward without its backward left gathered
            if not self.wrapper.ddp_config.overlap_param_gather:
                self.wrapper.start_param_sync()  # gathers all parameters; nothing else would
        self.stale = False
        self.installed = self._edits()  # now, because a gather may write to what the shards are views of

    def _edits(self) -> int:
        """Count writes to the shards: to the DTensors, and to their local tensors, which torch counts apart."""
        return sum(map(_changes, self.shards.values()))

    def _stepped(self, *_: Any) -> None:
        self.stale, self.installed = True, self._edits()  # the package installs what its own steps wrote

    def _continue_accumulating(self) -> None:
        """Prepare a backward after a synchronised one: it adds to the gradients that the shards have now."""
        if all(shard.grad is None for shard in self.shards.values()):
            self.wrapper.zero_grad_buffer()
            self.used.clear()
        elif self.wrapper.data_parallel_sharding_strategy == "optim":
            raise RuntimeError(
                "ZeRO 1 has reduced the gradients of the last backward, and would reduce them again; call "
                "optimizer.zero_grad() first, or run all but the last backward under runtime.no_sync()"
            )
        else:
            for name, shard in self.shards.items():
                self._take_back(name, shard.grad)
        self.reduced = False

    def _take_back(self, name: str, gradient: Any) -> None:
        """Let the package add to *gradient*, where the user dropped, replaced or changed what it had."""
        part = self._gradient_part(name)
        if gradient is None:
            self.used.discard(name)
            if part is not None:
                part.zero_()
            return
        self.used.add(name)
        shown, changes = self.shown.get(name, (None, 0))
        if part is not None and not (gradient is shown and _changes(gradient) == changes):
            part.copy_(gradient.to_local().flatten())

    def _gradient_part(self, name: str) -> Tensor | None:
        """Return where the package adds up this rank's part of a gradient, flat; None for what it took over frozen."""
        raw, buffer = self.wrapper.raw_param[name], self.wrapper.param_and_grad_buffer
        gradients = buffer.parameter_groups[buffer.param_to_param_group[raw]].main_grad_buffer
        return None if gradients is None else gradients.get_item(gradients.param_idx[raw])

    def _after_forward(self, model: nn.Module, args: Any, output: Any) -> None:
        if not torch.is_grad_enabled() and self.wrapper.ddp_config.overlap_param_gather:
            self.wrapper.synchronize_param_gather()  # puts the shards back; no backward will do it
            return
        self.wrapper._replace_param_with_distributed_if_needed()
        if not torch.is_grad_enabled():
            return
        tensors = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
        # The package's own hook needs a model that returns tensors; a transformers model returns a ModelOutput.
        torch.autograd.graph.register_multi_grad_hook(tensors, self._before_backward, mode="any")

    def _before_backward(self, gradients: Any) -> None:
        if self.in_backward:
            return
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a backward with create_graph=True is to be differentiated once more, and megatron_fsdp frees the "
                "parameters that this would read; use 'ddp', with cp_size=1 and tp_size=1"
            )
        if self.reduced:
            self._continue_accumulating()
        self.in_backward = True
        self._let_package_reduce(self.synchronise and self.wrapper.ddp_config.overlap_grad_reduce)
        self.wrapper._replace_param_with_raw_if_needed()
        if not self.wrapper._root_pre_backward_hook_issued:
            self.wrapper.pre_backward()
            run_after_backward(self.wrapper.post_backward)
        run_after_backward(self._after_backward)

    def _after_backward(self) -> None:
        self.in_backward = False
        self.wrapper._replace_param_with_distributed_if_needed()
        if self.synchronise:
            if not self.wrapper.ddp_config.overlap_grad_reduce:
                self.wrapper.finish_grad_sync()
            self._settle_gradients()
            self.reduced = True
        self._let_package_reduce(True)  # or its optimizer step would reduce once more

    def _let_package_reduce(self, reduce: bool) -> None:
        """Say whether the package reduces gradients during a backward.

        It does so however ``overlap_grad_reduce`` is set, and then reduces them again after the backward if it is off.
        """
        self.wrapper.model_auto_sync = self.wrapper.is_last_microbatch = reduce

    def _settle_gradients(self) -> None:
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
                self.shown[name] = shard.grad, _changes(shard.grad)

    @contextmanager
    def _unsynchronised(self) -> Iterator[None]:
        self.synchronise = False
        try:
            yield
        finally:
            self.synchronise = True

    @staticmethod
    @contextmanager
    def unsynchronised(engines: Sequence[Engine]) -> Iterator[None]:
        """Within the context, a backward leaves gradients unsynchronised; ZeRO 2 and 3 reduce, but do not show them."""
        with ExitStack() as stack:
            for engine in engines:
                stack.enter_context(engine._unsynchronised())
            yield

    def adopt(self, optimizer: Optimizer) -> Optimizer:
        """Let *optimizer* step the shards, without changing its state or the weights now.

        ``fully_shard_optimizer`` takes a real step to allocate the state, which moves every weight by the weight decay
        and counts as the first step. It gets a step that does nothing, and replaces it by its own. It also replaces the
        gradients, which may be those of a backward that came before, and drops them.
        """
        gradients = [(parameter, parameter.grad) for group in optimizer.param_groups for parameter in group["params"]]
        optimizer.register_step_post_hook(self._stepped)
        optimizer.step = lambda *args, **kwargs: None  # type: ignore[assignment]
        adopted: Optimizer = fully_shard_optimizer(optimizer, preproc_state_dict_for_dcp_ckpt=False)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        adopted.zero_grad = partial(self._zero_grad, adopted, adopted.zero_grad)  # type: ignore[method-assign]
        return adopted

    def _zero_grad(self, optimizer: Optimizer, drop: Callable[..., None], set_to_none: bool = True) -> None:
        """Drop the gradients of what *optimizer* trains, or set them to zero; the package drops those of all."""
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        held = [parameter for parameter in trained if parameter.grad is not None]
        names = {name for name, shard in self.shards.items() if any(shard is one for one in trained)}
        alone = all(name in names for name, shard in self.shards.items() if name in self.used or shard.grad is not None)
        drop(zero_grad_buffer=alone)
        self.shown = {} if alone else {name: one for name, one in self.shown.items() if name not in names}
        for name in names if not (alone or self.reduced) else ():  # else the next backward sees what was dropped
            self._take_back(name, None)
        if set_to_none:
            self.used -= names
        else:
            self.reduced = self.reduced and not alone  # if alone there is nothing to reduce once more
            for parameter in held:
                parameter.grad = torch.zeros_like(parameter)


def _changes(tensor: Any) -> int:
    """Count writes to a DTensor: to itself, and to its local tensor, which torch counts apart."""
    return changes_in_place(tensor) + changes_in_place(tensor.to_local())
