"""The load balancing loss of routers, over all the tokens of a step.

transformers adds to a model's loss ``coefficient * experts * sum_e f_e * P_e``, with f_e the share of the routed tokens
that chose expert e and P_e the mean probability that routers gave it (Switch Transformer, arXiv:2101.03961). It is a
product of two means over tokens, so that its mean over ranks or microbatches is not its value on the whole batch, nor
does it count labels. Here the model leaves it out, hooks on the routers sum up what it needs, the sums are added over
all ranks, and every router's backward gets the gradient of the whole: f_e is a constant to it, so it is linear in the
local probabilities.

What transformers records as router logits is private to it and read here only; ``tests/test_routing.py`` holds the
contract: thirty model families have the one formula, and any other is refused.
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
from transformers.utils.output_capturing import OutputRecorder

if TYPE_CHECKING:
    from nemo_dist.context import MeshContext
    from nemo_dist.hooks import Batch

SWITCH = "output_router_logits"  # the argument, and the config's field, that turns the loss on
# In a batch, optional: which tokens of (rows, length) count, where that is not what attention_mask says. Whoever
# appends tokens or rows of its own gives it; the model does not get it.
COUNTED = "counted_tokens"
_FORMULA = "load_balancing_loss_func"
_ARGUMENTS = ("gate_logits", "num_experts", "top_k", "attention_mask")


@attrs.define(eq=False)
class RouterLoss:
    """The load balancing loss of one model, whose routers are hooked; idle outside of ``step``."""

    experts: int
    top_k: int
    coefficient: float
    default: bool
    device: torch.device
    groups: Sequence[dist.ProcessGroup]
    _active: bool = False
    _counting: bool = False
    _mask: Tensor | None = None
    _sums: Tensor = attrs.field(init=False)  # per expert the choices and the probabilities, and the number of rows
    _slope: Tensor = attrs.field(init=False)  # the gradient of the loss by the sum of each expert's probabilities

    def __attrs_post_init__(self) -> None:
        self._clear()

    @classmethod
    def of(cls, parts: Sequence[nn.Module], mesh: MeshContext) -> RouterLoss | None:
        """Hook the routers of *parts*; None where the model has no load balancing loss.

        Ranks of ``dp_cp`` route different tokens and ranks of ``pp`` hold different routers, so what they count is
        added; ranks of ``tp`` route the same tokens.

        Raises ValueError when it has one that is turned on, and its form is not known.
        """
        model: Any = parts[0]
        formula = _formula(model)
        if formula is None:
            return None
        config = model.config.get_text_config()
        default = bool(getattr(config, SWITCH, False))
        experts, top_k = getattr(config, "num_experts", None), getattr(config, "num_experts_per_tok", None)
        coefficient = getattr(model, "router_aux_loss_coef", getattr(config, "router_aux_loss_coef", None))
        known = tuple(inspect.signature(formula).parameters) == _ARGUMENTS and not config.is_encoder_decoder
        experts = experts or getattr(config, "num_local_experts", None) or getattr(config, "moe_num_experts", None)
        if not known or experts is None or top_k is None or coefficient is None:
            if default:
                raise ValueError(
                    f"{_kind(model)} has a router loss whose form is not known, so it cannot be summed over ranks; "
                    f"load it with {SWITCH}=False"
                )
            return None
        groups = [group for axis in ("dp_cp", "pp") if (group := mesh.group(axis)) is not None]
        loss = cls(experts, top_k, float(coefficient), default, mesh.device, groups)
        for part in parts:
            loss._hook(part)
        return loss

    def wanted(self, batches: Iterable[Batch]) -> bool:
        """Whether *batches* ask for the loss; raise ValueError when only some of them do."""
        asked = {bool(self.default if batch.get(SWITCH) is None else batch[SWITCH]) for batch in batches}
        if len(asked) > 1:
            raise ValueError(f"{SWITCH} is True in some batches of a step and False in others; give them one value")
        return asked == {True}

    @staticmethod
    def without(batch: Batch) -> dict[str, Any]:
        """Return *batch* for a forward in which the model adds no router loss, and which says what counts in ours."""
        counted = batch.get(COUNTED, batch.get("attention_mask"))
        if counted is None:
            tokens = batch["input_ids"] if batch.get("input_ids") is not None else batch["inputs_embeds"]
            counted = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return {**batch, SWITCH: False, COUNTED: counted}

    @contextmanager
    def step(self) -> Iterator[None]:
        """Within the context, routers count from the start until ``settle``, and backwards add the loss's gradient."""
        self._clear()
        self._active = self._counting = True
        try:
            yield
        finally:
            self._active = self._counting = False
            self._mask = None

    @contextmanager
    def survey(self) -> Iterator[None]:
        """Within the context, forwards only count: no gradients, and the random numbers are given back.

        So the forwards that follow draw the same dropout, and choose the same experts.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad():
            yield

    def settle(self, scale: float) -> Tensor:
        """Add up what was counted and return the loss of all tokens, a 0-dim float32 tensor, equal on every rank.

        Backwards from now on add *scale* times its gradient.
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

    def _hook(self, part: nn.Module) -> None:
        part.register_forward_pre_hook(self._note_mask, with_kwargs=True, prepend=True)
        for module, index in _routers(part).items():
            module.register_forward_hook(partial(self._route, index))

    def _note_mask(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if not self._active:
            return None
        counted = kwargs.pop(COUNTED, None)  # a forward without it is not one of this step
        self._mask = None if counted is None else counted.reshape(-1).float()
        return args, kwargs

    def _route(self, index: int, module: nn.Module, args: Any, output: Any) -> Any:
        """Count what a router chose, and tie the loss to one of its other outputs; called after its forward."""
        mask = self._mask if self._active else None
        if mask is None or not isinstance(output, tuple) or output[index] is None:
            return None
        logits: Tensor = output[index]
        if self._counting:
            self._count(logits.detach(), mask)
        if not torch.is_grad_enabled() or not logits.requires_grad:
            return None
        at = next(
            i
            for i, value in enumerate(output)
            if i != index and isinstance(value, Tensor) and value.is_floating_point() and value.requires_grad
        )
        tied = _Tied.apply(output[at], logits, mask, self)  # type: ignore[no-untyped-call]
        return (*output[:at], tied, *output[at + 1 :])

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


class _Tied(torch.autograd.Function):
    """The identity on a tensor, whose backward adds the gradient of the router loss to the logits."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, logits: Tensor, mask: Tensor, loss: RouterLoss) -> Tensor:
        ctx.save_for_backward(logits)
        # The mask belongs to this forward: a recomputation may run while another microbatch's is current.
        ctx.mask, ctx.loss = mask, loss
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        with torch.enable_grad():
            logits = ctx.saved_tensors[0].detach().requires_grad_()
            probabilities = torch.softmax(logits, dim=-1).float()
            (slope,) = torch.autograd.grad((probabilities @ ctx.loss._slope * ctx.mask).sum(), logits)
        return grad, slope, None, None


def _kind(model: nn.Module) -> str:
    """Return the name of the model's class as transformers knows it, below what FSDP made of it."""
    return next(base.__name__ for base in type(model).__mro__ if base.__module__.startswith("transformers."))


def _formula(model: nn.Module) -> Any:
    """Return the function with which transformers computes the load balancing loss of *model*, or None."""
    if SWITCH not in inspect.signature(type(model).forward).parameters:
        return None
    modules = (sys.modules.get(base.__module__) for base in type(model).__mro__)
    return next((found for module in modules if (found := getattr(module, _FORMULA, None))), None)


def _routers(part: nn.Module) -> dict[nn.Module, int]:
    """Return the modules of *part* that transformers records router logits of, and where they are in the output."""
    found: dict[nn.Module, int] = {}
    for owner in part.modules():
        recorders = (getattr(owner, "_can_record_outputs", None) or {}).get("router_logits", [])
        for recorder in recorders if isinstance(recorders, list) else [recorders]:
            if not isinstance(recorder, OutputRecorder) or recorder.target_class is None:
                continue
            for name, module in owner.named_modules():
                if isinstance(module, recorder.target_class) and (recorder.layer_name or "") in name:
                    found.setdefault(module, recorder.index)
    return found
