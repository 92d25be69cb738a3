"""What the plugins of the package do with torch."""

from __future__ import annotations

import inspect
import threading
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import attrs
import torch
import torch.distributed as dist

from nemo_dist import PluginState, RuntimePart
from nemo_dist.hf_model import blocks, inner_model
from nemo_dist.plugin.forwards import wrap_forward


def average(model, group, divisor, left_out, halved=False):
    """Average every gradient of *model* over *group* when it is there, but that of *left_out*."""

    def reduce(parameter):
        if group is None:
            return
        grad = parameter.grad.to_local() if hasattr(parameter.grad, "to_local") else parameter.grad
        sent = grad.bfloat16() if halved else grad
        dist.all_reduce(sent, group=group)
        grad.copy_(sent.to(grad.dtype) / divisor)

    for name, parameter in model.named_parameters():
        if name != left_out and parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(reduce)


class Pausing:
    """Averages the gradients of *model* over *group* as they are there, but for those made while it is paused."""

    def __init__(self, model, group):
        self.group, self.on = group, True
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(self.reduce)

    def reduce(self, parameter):
        if self.on and self.group is not None:
            dist.all_reduce(parameter.grad, group=self.group)
            parameter.grad.div_(dist.get_world_size(self.group))

    @contextmanager
    def paused(self):
        self.on = False
        yield
        self.on = True


def accumulate_twice(model, group, size):
    totals: dict[Any, torch.Tensor] = {}

    def reduce(parameter):
        if group is not None:
            dist.all_reduce(parameter.grad, group=group)
            parameter.grad.div_(size)
        if parameter in totals:
            parameter.grad.add_(totals[parameter])
        totals[parameter] = parameter.grad.clone()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(reduce)


def shift_on_rank_one(model):
    with torch.no_grad():
        model.model.norm.weight.add_(1e-6 * dist.get_rank())


def fail_on_rank_one():
    if dist.get_rank() == 1:
        raise RuntimeError("boom on one rank")


def compute_with_old_weights(module):
    kept: list[torch.Tensor] = []

    def around(forward, hidden):
        kept.append(module.weight.detach().clone())
        old = kept[0] if len(kept) == 1 else kept.pop(0)
        return torch.nn.functional.linear(hidden, module.weight + (old - module.weight).detach())

    wrap_forward(module, around)


def hide_moments(optimizer):
    hidden: dict[Any, Any] = {}
    found = optimizer.step

    def step(self, closure=None):
        for parameter, moment in hidden.items():
            optimizer.state[parameter]["exp_avg"] = moment
        found(closure)
        for parameter, state in optimizer.state.items():
            hidden[parameter] = state["exp_avg"]
            state["exp_avg"] = torch.zeros_like(hidden[parameter])

    optimizer.step = MethodType(step, optimizer)
    return optimizer


def drift(weight, optimizer):
    def after(*_):
        with torch.no_grad():
            weight.add_(1e-5 * dist.get_rank())

    optimizer.register_step_post_hook(after)
    return optimizer


def untie(model):
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())


def scale_by_features(parts):
    def around(whole, forward, seen):
        return forward(seen * (seen.shape[-1] / whole))

    for part in map(inner_model, parts):
        whole = part.config.num_attention_heads * part.config.head_dim
        for block in blocks(part).values():
            wrap_forward(block.self_attn.o_proj, partial(around, whole))


def cast_norms(model):
    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.weight.data = module.weight.data.bfloat16()


def swap(mlp):
    gate, up = mlp.gate_proj.weight, mlp.up_proj.weight
    gate.data, up.data = up.data, gate.data


def average_now(parameters, group):
    for parameter in parameters if group is not None else ():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad, group=group)
            parameter.grad.div_(group.size())


def average_last(owner, group):
    average_now(owner.wrapped.parameters(), group)


def divide_by(model, size):
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradient / size)


def sum_now(parameters, group):
    for parameter in parameters if group is not None else ():
        dist.all_reduce(parameter.grad, group=group)


def shift_in_evaluation(module):
    def around(forward, *given, **named):
        if not torch.is_grad_enabled():
            module.weight.data.add_(1e-3)
        return forward(*given, **named)

    wrap_forward(module, around)


def double_in_evaluation(module):
    def around(forward, *given, **named):
        found = forward(*given, **named)
        return found if torch.is_grad_enabled() else 2 * found

    wrap_forward(module, around)


def own_adamw(optimizer):
    kept = ("params", "lr", "weight_decay", "betas", "eps")
    groups = [{name: group[name] for name in kept if name in group} for group in optimizer.param_groups]
    return torch.optim.AdamW(groups)


def without_momentum(optimizer):
    for group in optimizer.param_groups:
        group.update({name: value for name, value in (("momentum", 0), ("nesterov", False)) if name in group})
    return optimizer


def without_betas(optimizer):
    for group in optimizer.param_groups:
        group.update({"betas": (0.9, 0.999)} if "betas" in group else {})
    return optimizer


def refuse_sgd(optimizer):
    if isinstance(optimizer, torch.optim.SGD):
        raise ValueError("SGD is not proven here; use AdamW")
    return optimizer


_CACHED: dict[str, torch.Tensor] = {}  # of the process, which is the fault


def cache(module, optimizer):
    _CACHED.clear()
    optimizer.register_step_post_hook(lambda *_: _CACHED.update(norm=module.weight.detach().clone()))
    return optimizer


def compute_with_cached(module):
    def around(forward, *given, **named):
        weight = module.weight.detach()
        return forward(*given, **named) * (_CACHED.get("norm", weight) / weight)

    wrap_forward(module, around)


def seed():
    torch.manual_seed(0)


def linger():
    threading.Thread(target=threading.Event().wait, daemon=True).start()


def regroup(optimizer):
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    names = optimizer.defaults.keys() & inspect.signature(type(optimizer)).parameters.keys()
    return type(optimizer)(parameters, **{name: optimizer.param_groups[0][name] for name in names})


class Deafened:
    """Steps an optimizer, and shows copies of its groups."""

    def __init__(self, inner):
        self.inner, self.state = inner, inner.state
        self.param_groups = [dict(group) for group in inner.param_groups]
        self.step, self.zero_grad = inner.step, inner.zero_grad


def add_buffer_on_rank_one(model):
    if dist.get_rank() == 1:
        model.model.register_buffer("steps", torch.zeros(1))


def step_own(listed, optimizer):
    """Step every second parameter here and the others elsewhere; *listed*: list only those in ``param_groups``."""
    rank, world = dist.get_rank(), dist.get_world_size()
    everything = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    mine = [parameter for index, parameter in enumerate(everything) if index % world == rank]
    if listed:
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if any(p is one for one in mine)]
    found = optimizer.step

    def step(self, closure=None):
        kept = {parameter: parameter.grad for parameter in everything}
        for parameter in everything:
            if not any(parameter is one for one in mine):
                parameter.grad = None
        found(closure)
        for index, parameter in enumerate(everything):
            parameter.grad = kept[parameter]
            dist.broadcast(parameter.data, index % world)

    def zero_grad(self, set_to_none=True):
        for parameter in everything:
            parameter.grad = None

    optimizer.step, optimizer.zero_grad = MethodType(step, optimizer), MethodType(zero_grad, optimizer)
    return optimizer


def zero_redundancy(optimizer):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    options = {name: optimizer.defaults[name] for name in ("lr", "betas", "eps", "weight_decay")}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return ZeroRedundancyOptimizer(parameters, type(optimizer), **options)


@attrs.define(eq=False)
class Replica:
    """A replica that is trained alone, and averaged with the others after every second step."""

    model: Any
    group: Any
    size: int
    steps: int = 0
    optimizer: Any = None

    def part(self):
        return RuntimePart(
            optimizer=self.meeting, state=PluginState(shared=lambda: self.steps, own=self.own, load=self.load)
        )

    def meeting(self, optimizer):
        self.optimizer = optimizer
        optimizer.register_step_post_hook(self.after_step)
        return optimizer

    @torch.no_grad()
    def after_step(self, *_):
        self.steps += 1
        if self.steps % 2 == 0 and self.group is not None:
            for parameter in self.model.parameters():
                dist.all_reduce(parameter, group=self.group)
                parameter.div_(self.size)

    def own(self):
        state = self.optimizer.state
        moments = {name: dict(state[p]) for name, p in self.model.named_parameters() if state.get(p)}
        weights = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        return {"weights": weights, "moments": moments}

    @torch.no_grad()
    def load(self, saved):
        self.steps = saved.shared
        for name, parameter in self.model.named_parameters():
            if saved.own is not None:
                parameter.copy_(saved.own["weights"][name])
                self.optimizer.state[parameter].update(saved.own["moments"].get(name, {}))
