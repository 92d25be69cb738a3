"""The load balancing loss of mixture-of-experts routers, over all tokens of a step.

transformers adds to a model's loss ``coefficient * experts * sum_e f_e * P_e``, with f_e the share of the routed tokens
that chose expert e and P_e the mean probability that routers gave it (Switch Transformer, arXiv:2101.03961). This is a
product of two means over tokens, so its mean over ranks or microbatches is not its value on the whole batch, and it is
not weighted by labels. Here the model leaves it out, hooks on the routers sum the choices and probabilities, the sums
are all-reduced, and the backward of every router adds the gradient of the loss of all tokens: f_e has no gradient, so
the loss is linear in the local probabilities.

What transformers records as router logits is private to it and read in this module only; ``tests/test_routing.py``
tests what is relied on: thirty model families use this one formula, and a model with another is rejected.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.utils.output_capturing import OutputRecorder

from nemo_dist.hf_model import class_name
from nemo_dist.planning.mesh_plan import Role

if TYPE_CHECKING:
    from nemo_dist.mesh.mesh_context import MeshContext
    from nemo_dist.plugin.hookspecs import Batch

SWITCH = "output_router_logits"  # the argument, and the config's field, that turns the loss on
# Optional key of a batch: a mask of shape (rows, length) of the tokens that count, where attention_mask is not that
# mask. A plugin that appends padding tokens or rows sets it; it is removed before the model's forward.
COUNTED = "counted_tokens"
_FORMULA = "load_balancing_loss_func"
# The names under which models or their configs hold the numbers that they pass to the formula.
_EXPERTS = ("num_experts", "num_local_experts", "moe_num_experts", "n_routed_experts")
_TOP_K = ("num_experts_per_tok",)
_COEFFICIENT = ("router_aux_loss_coef", "aux_loss_coef")
_ARGUMENTS = ("gate_logits", "num_experts", "top_k", "attention_mask")
_LOSS = "_nemo_dist_router_loss"  # in the model's __dict__


@attrs.define(eq=False)
class RouterLoss:
    """The load balancing loss of one model, whose routers have hooks; they do nothing outside of ``step``.

    A model has one, whatever runtimes it has: the hooks of two would take each other's masks.
    """

    experts: int
    top_k: int
    coefficient: float
    default: bool
    device: torch.device
    groups: Sequence[dist.ProcessGroup]
    unknown: str = ""  # why the loss is not supported, where it is off by default and its formula is not known
    _active: bool = False
    _counting: bool = False
    _mask: Tensor | None = None
    _hooks: list[Any] = attrs.field(factory=list)
    # Of shape (2 * experts + 1,): choices per expert, summed probabilities per expert, number of tokens routed.
    _sums: Tensor = attrs.field(init=False)
    _slope: Tensor = attrs.field(init=False)  # (experts,): gradient of the loss by each expert's summed probabilities

    def __attrs_post_init__(self) -> None:
        self._clear()

    @classmethod
    def of(cls, parts: Sequence[nn.Module], mesh: MeshContext) -> RouterLoss | None:
        """Register hooks on the routers of *parts*; return None when the model has no load balancing loss.

        Sums are all-reduced over the ranks that see different tokens and over those that hold different layers, so
        other routers. Ranks that split parameters route the same tokens.

        Raises ValueError when the loss is on by default and its formula is not known.
        """
        model: Any = parts[0]
        formula = _formula(model)
        if formula is None:
            return None
        config = model.config.get_text_config()
        default = bool(getattr(config, SWITCH, False))
        experts, top_k, coefficient = (_number(model, config, names) for names in (_EXPERTS, _TOP_K, _COEFFICIENT))
        known = tuple(inspect.signature(formula).parameters) == _ARGUMENTS and not config.is_encoder_decoder
        if not known or experts is None or top_k is None or coefficient is None or not _recorders_known(model):
            unknown = (
                f"{class_name(model)} has a router loss whose form is not known, so it cannot be summed over ranks; "
                f"load it with {SWITCH}=False"
            )
            if default:
                raise ValueError(unknown)
            return cls(0, 0, 0.0, default, mesh.device, (), unknown)
        groups = [group for role in (Role.TOKENS, Role.LAYERS) if (group := mesh.group(role)) is not None]
        loss: RouterLoss = vars(model).setdefault(_LOSS, cls(0, 0, 0.0, default, mesh.device, groups))
        loss.experts, loss.top_k, loss.coefficient, loss.default = int(experts), int(top_k), float(coefficient), default
        loss._hook(parts)
        return loss

    def wanted(self, batches: Iterable[Batch]) -> bool:
        """Whether *batches* ask for the loss; raise ValueError when only some do, or when its formula is not known."""
        asked = {bool(self.default if batch.get(SWITCH) is None else batch[SWITCH]) for batch in batches}
        if len(asked) > 1:
            raise ValueError(f"{SWITCH} is True in some batches of a step and False in others; give them one value")
        if self.unknown and True in asked:
            raise ValueError(self.unknown)
        return asked == {True}

    @staticmethod
    def without(batch: Batch) -> dict[str, Any]:
        """Return *batch* with the model's own router loss off, and with the mask of the tokens that count in ours."""
        counted = batch.get(COUNTED, batch.get("attention_mask"))
        if counted is None:
            tokens = batch["input_ids"] if batch.get("input_ids") is not None else batch["inputs_embeds"]
            counted = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return {**batch, SWITCH: False, COUNTED: counted}

    @contextmanager
    def step(self) -> Iterator[None]:
        """Within the context, routers count until ``settle``, and their backwards add the gradient of the loss."""
        self._clear()
        self._active = self._counting = True
        try:
            yield
        finally:
            self._active = self._counting = False
            self._mask = None

    def settle(self, scale: float) -> Tensor:
        """All-reduce the sums and return the loss of all tokens, a 0-dim float32 tensor, equal on every rank.

        From now on backwards add *scale* times its gradient.
        """
        self._counting = False
        for group in self.groups:
            dist.all_reduce(self._sums, group=group)
        rows = self._sums[-1].clamp(min=1)
        chosen, mass = self._sums[: self.experts] / rows, self._sums[self.experts : -1] / rows
        weight = self.coefficient * self.experts
        self._slope = scale * weight * chosen / rows
        return weight * (chosen * mass).sum()

    def _clear(self) -> None:
        self._sums = torch.zeros(2 * self.experts + 1, device=self.device)
        self._slope = torch.zeros(self.experts, device=self.device)

    def _hook(self, parts: Iterable[nn.Module]) -> None:
        """Register the hooks on *parts* as they are now, in place of earlier ones."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for part in parts:
            self._hooks.append(part.register_forward_pre_hook(self._note_mask, with_kwargs=True, prepend=True))
            for module, index in _routers(part).items():
                self._hooks.append(module.register_forward_hook(partial(self._route, index)))

    def _note_mask(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        counted = kwargs.pop(COUNTED, None)  # a forward without it does not belong to this step
        self._mask = counted.reshape(-1).float() if self._active and counted is not None else None
        return args, kwargs

    def _route(self, index: int, module: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook of a router: count its choices, and attach the gradient of the loss to one of its outputs."""
        mask = self._mask if self._active else None
        values = output if isinstance(output, tuple) else (output,)
        index = index if isinstance(output, tuple) else 0  # as transformers reads what it records
        if mask is None or values[index] is None:
            return None
        return self._tie(output, values, index, mask)

    # Not compiled: the backward reads the slope, which is known only after the forward, and a graph would keep that of
    # the step in which it was made.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _tie(self, output: Any, values: tuple[Any, ...], index: int, mask: Tensor) -> Any:
        """Count the choices by the logits, ``values[index]``; return *output* with the gradient of the loss attached.

        None stands for *output* as it is, where there is no backward.
        """
        logits: Tensor = values[index]
        if self._counting:
            self._count(logits.detach(), mask)
        if not torch.is_grad_enabled() or not logits.requires_grad:
            return None
        # The model may not use the logits, and then they get no backward: attach to another output where there is one.
        others = [i for i, value in enumerate(values) if i != index and _differentiable(value)]
        at = others[0] if others else index
        tied = _Tied.apply(values[at], logits, mask, self)  # type: ignore[no-untyped-call]
        return (*values[:at], tied, *values[at + 1 :]) if isinstance(output, tuple) else tied

    def _count(self, logits: Tensor, mask: Tensor) -> None:
        if mask.numel() != logits.shape[0]:
            raise ValueError(
                f"a router got {logits.shape[0]} tokens, but {mask.numel()} of the batch are known; pass an "
                "attention_mask of shape (rows, length), or none"
            )
        probabilities = torch.softmax(logits, dim=-1)
        choices = torch.topk(probabilities, self.top_k, dim=-1).indices
        self._sums[: self.experts].scatter_add_(0, choices.reshape(-1), mask.repeat_interleave(self.top_k))
        self._sums[self.experts : -1] += (probabilities.float() * mask.unsqueeze(-1)).sum(0)
        self._sums[-1] += mask.sum()


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.requires_grad


class _Tied(torch.autograd.Function):
    """Identity of *carrier*, whose backward also passes the gradient of the router loss to *logits*."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, logits: Tensor, mask: Tensor, loss: RouterLoss) -> Tensor:
        ctx.save_for_backward(logits)
        # The mask of this forward: a recomputation may run when the current mask is that of another microbatch.
        ctx.mask, ctx.loss = mask, loss
        return carrier.view_as(carrier)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        with torch.enable_grad():
            logits = ctx.saved_tensors[0].detach().requires_grad_()
            probabilities = torch.softmax(logits, dim=-1).float()
            (slope,) = torch.autograd.grad((probabilities @ ctx.loss._slope * ctx.mask).sum(), logits)
        return grad, slope, None, None


def _formula(model: nn.Module) -> Any:
    """Return the function by which transformers computes the load balancing loss of *model*, or None."""
    if SWITCH not in inspect.signature(type(model).forward).parameters:
        return None
    modules = (sys.modules.get(base.__module__) for base in type(model).__mro__)
    return next((found for module in modules if (found := getattr(module, _FORMULA, None))), None)


def _number(model: nn.Module, config: Any, names: Sequence[str]) -> Any:
    """Return the first number under one of *names*, on the model before its config, or None."""
    owners = [(owner, name) for owner in (model, config) for name in names]
    return next((value for owner, name in owners if (value := getattr(owner, name, None)) is not None), None)


def _recorders_known(model: nn.Module) -> bool:
    """Whether every module that transformers records router logits of is found by ``_routers``."""
    declared = [r for owner in model.modules() for r in _recorders(owner)]
    return bool(declared) and all(isinstance(r, OutputRecorder) and r.target_class is not None for r in declared)


def _recorders(owner: nn.Module) -> list[Any]:
    found = (getattr(owner, "_can_record_outputs", None) or {}).get("router_logits", [])
    return found if isinstance(found, list) else [found]


def _routers(part: nn.Module) -> dict[nn.Module, int]:
    """Return the modules of *part* whose router logits transformers records, and the index of those in the output."""
    found: dict[nn.Module, int] = {}
    for owner in part.modules():
        for recorder in _recorders(owner):
            for name, module in owner.named_modules():
                if isinstance(module, recorder.target_class) and (recorder.layer_name or "") in name:
                    found.setdefault(module, recorder.index)
    return found
