"""Drive Megatron-FSDP in a training step, through hooks on the transformers model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MethodType
from typing import Any

import attrs
import torch
from megatron_fsdp import fully_shard_optimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from nemo_dist.mesh.dtensor import parameter_slots
from nemo_dist.torch_private import gradient_hooks, number_of_backward, run_after_backward, tensors_in, writes_to
from nemo_dist_megatron_fsdp.gradients import Gradients
from nemo_dist_megatron_fsdp.parameter_shard import guard
from nemo_dist_megatron_fsdp.row_layout import RowLayout

_ENGINE = "_nemo_dist_megatron_fsdp"  # key in the model's __dict__, so that the engine is no submodule
_NONE = -1  # the number of no backward


@attrs.define(kw_only=True, eq=False)
class Engine:
    """The package's wrapper of one model, and what its hooks on the model need to remember.

    The wrapper's own forward only swaps the shards, which the optimizer and the user see, for the parameters that the
    model computes with. Hooks on the model do the same, so the model needs no wrapping. Outside of a forward and a
    backward the parameters of the model are its shards, and their ``grad`` the shards of the gradients.
    """

    wrapper: Any
    layout: RowLayout
    shards: dict[str, Any]
    slots: list[tuple[str, dict[str, Any], str, Any]]  # a name, the dict of a module's own parameters, its name there
    gradients: Gradients
    synchronise: bool = True
    backward: int = _NONE  # the number of the one that began, and did not end
    installed: int = -1
    stale: bool = True

    @classmethod
    def start(cls, model: nn.Module, wrapper: Any, layout: RowLayout) -> None:
        """Attach an engine to *model*."""
        slots = [(name, module._parameters, slot, one) for name, module, slot, one in parameter_slots(model)]
        shards: dict[str, Any] = dict(model.named_parameters())
        for name, shard in shards.items():
            layout.correct(name, shard)
        guard(model, shards)
        gradients = Gradients(wrapper=wrapper, layout=layout, shards=shards)
        gradients.watch()
        engine = cls(wrapper=wrapper, layout=layout, shards=shards, slots=slots, gradients=gradients)
        model.__dict__[_ENGINE] = engine
        for module in model.modules():
            module.__dict__["zero_grad"] = partial(engine._zero_grad_of_module, module)
        wrapper.all_gather_and_wait_parameters_ready = partial(
            engine._gather, wrapper.all_gather_and_wait_parameters_ready
        )
        model.register_forward_pre_hook(engine._before_forward, prepend=True)
        model.register_forward_hook(engine._after_forward)
        model.register_forward_hook(engine._after_failed_forward, always_call=True)

    @staticmethod
    def of(model: nn.Module) -> Engine:
        """Return the engine of *model*."""
        engine: Engine = model.__dict__[_ENGINE]
        return engine

    def _before_forward(self, model: nn.Module, args: Any) -> None:
        if self._repeats():
            return
        self._notice_failure()
        self._refuse_thawed()
        self._refuse_lost()
        self._install_changed_weights()
        self.wrapper._replace_param_with_raw_if_needed()

    def _repeats(self) -> bool:
        """Whether a forward runs again inside of its backward, which has put the parameters in place."""
        return self.backward != _NONE and self.backward == number_of_backward()

    def _gather(self, gather: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Gather parameters for a module; refuse one that runs while the model has its shards."""
        if self.wrapper.is_param_fsdp_distributed:
            if number_of_backward() == _NONE:
                raise RuntimeError(
                    "a module of the model was called by itself, which under megatron_fsdp has only a shard of its "
                    "parameters; call the whole model (output_hidden_states=True returns what is inside), or use "
                    "'fsdp2'"
                )
            raise RuntimeError(
                "a backward reached the model by another way than what its forward returned, which megatron_fsdp "
                "needs to begin; let the forward return it (output_hidden_states=True), or use 'fsdp2'"
            )
        gather(*args, **kwargs)

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
        self._refuse_hooked()

    def _refuse_hooked(self) -> None:
        """Refuse hooks of gradients: the package takes the gradients of other parameters."""
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
        """Count writes to the shards."""
        return sum(map(writes_to, self.shards.values()))

    def _stepped(self, *_: Any) -> None:
        self.stale, self.installed = True, self._edits()  # the package installs what its own steps wrote

    def _after_forward(self, model: nn.Module, args: Any, output: Any) -> None:
        if self._repeats():
            return
        if not torch.is_grad_enabled() and self.wrapper.ddp_config.overlap_param_gather:
            self.wrapper.synchronize_param_gather()  # puts the shards back; no backward will do it
            return
        self.wrapper._replace_param_with_distributed_if_needed()
        if not torch.is_grad_enabled():
            return
        tensors = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
        begin = partial(self._before_backward, self._edits())
        # The package's own hook needs a model that returns tensors; a transformers model returns a ModelOutput.
        torch.autograd.graph.register_multi_grad_hook(tensors, begin, mode="any")

    def _after_failed_forward(self, model: nn.Module, args: Any, output: Any) -> None:
        """Put the shards back when the forward raised; inside a backward its end does, or what notices its failure."""
        if output is None and number_of_backward() == _NONE:
            self.wrapper._replace_param_with_distributed_if_needed()

    def _before_backward(self, edits: int, gradients: Any) -> None:
        if self._edits() != edits:
            raise RuntimeError(
                "weights were changed between a forward and its backward, which would compute with both; run the "
                "forward again"
            )
        if self._repeats():
            return
        self._notice_failure()
        self._refuse_hooked()
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a backward with create_graph=True is to be differentiated once more, and megatron_fsdp frees the "
                "parameters that this would read; use 'ddp', with cp_size=1 and tp_size=1"
            )
        self.gradients.begin()
        self.backward = number_of_backward()
        self._let_package_reduce(self.synchronise and self.wrapper.ddp_config.overlap_grad_reduce)
        self.wrapper._replace_param_with_raw_if_needed()
        if not self.wrapper._root_pre_backward_hook_issued:
            self.wrapper.pre_backward()
            run_after_backward(self.wrapper.post_backward)
        run_after_backward(self._after_backward)

    def _after_backward(self) -> None:
        self.backward = _NONE
        self.wrapper._replace_param_with_distributed_if_needed()
        if self.synchronise:
            if not self.wrapper.ddp_config.overlap_grad_reduce:
                self.wrapper.finish_grad_sync()
            self.gradients.settle()
        self._let_package_reduce(True)  # or its optimizer step would reduce once more

    def _notice_failure(self) -> None:
        """Undo what a backward that raised had begun, and the package would end with it."""
        number, wrapper = number_of_backward(), self.wrapper
        begun = self.backward not in (_NONE, number)
        if not begun and not (number == _NONE and wrapper._root_pre_backward_hook_issued):
            return
        self.backward = _NONE
        wrapper._root_pre_backward_hook_issued = False
        self.gradients.fail()
        pipeline = wrapper.grad_reduce_pipeline
        pipeline.wait_for_previous_grad_reduce(0)
        for ready in pipeline.bucket_grad_ready_params:
            ready.clear()
        pipeline.reset()
        self._let_package_reduce(True)
        wrapper.synchronize_param_gather()
        wrapper._replace_param_with_distributed_if_needed()
        self.stale = True

    def _let_package_reduce(self, reduce: bool) -> None:
        """Say whether the package reduces gradients during a backward.

        It does so however ``overlap_grad_reduce`` is set, and then reduces them again after the backward if it is off.
        """
        self.wrapper.model_auto_sync = self.wrapper.is_last_microbatch = reduce

    @contextmanager
    def _unsynchronised(self) -> Iterator[None]:
        before, self.synchronise = self.synchronise, False
        try:
            yield
        finally:
            self.synchronise = before

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
        groups = optimizer.param_groups
        gradients = [(parameter, parameter.grad) for group in groups for parameter in group["params"]]
        optimizer.register_step_post_hook(self._stepped)
        optimizer.step = lambda *args, **kwargs: None  # type: ignore[assignment]
        optimizer.param_groups = [group for group in groups if group["params"]]  # the package looks into the first
        adopted: Optimizer = fully_shard_optimizer(optimizer, preproc_state_dict_for_dcp_ckpt=False)
        adopted.param_groups = groups
        for parameter, gradient in gradients:
            parameter.grad = gradient
        adopted.zero_grad = partial(self._zero_grad, adopted, adopted.zero_grad)  # type: ignore[method-assign]
        step = adopted.step

        def step_of_package(one: Optimizer, *args: Any, **options: Any) -> Any:
            return self._step(step, one, *args, **options)

        adopted.step = MethodType(step_of_package, adopted)  # type: ignore[method-assign]
        return adopted

    def _step(
        self, step: Callable[..., Any], optimizer: Optimizer, closure: Callable[[], Any] | None = None, **options: Any
    ) -> Any:
        """Take a step and return what *closure* did, of which the package returns nothing."""
        if closure is None:
            return step(**options)
        values: list[Any] = []

        def kept() -> Any:
            values.append(closure())
            return values[-1]

        step(kept, **options)
        return values[0] if values else None

    def unreduced(self) -> dict[Any, Callable[[], None]]:
        """Return the parameters whose gradients are not whole, each with a function that drops them."""
        self._notice_failure()
        return self.gradients.unreduced()

    def _zero_grad(self, optimizer: Optimizer, drop: Callable[..., None], set_to_none: bool = True) -> None:
        """Drop the gradients of what *optimizer* trains, or set them to zero; the package drops those of all."""
        self._notice_failure()
        drop(set_to_none=set_to_none, zero_grad_buffer=False)
        self.gradients.forget(self._names(_parameters(optimizer)))

    def _zero_grad_of_module(self, module: nn.Module, set_to_none: bool = True) -> None:
        """Drop the gradients of *module*, or set them to zero; those too that wait in the package's buffers."""
        self._notice_failure()
        type(module).zero_grad(module, set_to_none)
        self.gradients.forget(self._names(module.parameters()))

    def _names(self, parameters: Iterable[Tensor]) -> list[str]:
        ids = set(map(id, parameters))
        return [name for name, shard in self.shards.items() if id(shard) in ids]


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
