"""What the plugins of the package do with torch."""

from __future__ import annotations

from functools import partial
from typing import Any

import attrs
import torch
from torch import nn

from nemo_dist import PluginState, RuntimePart
from nemo_dist.hf_model import name_root


class Around(nn.Module):
    """Hold a module and hand everything through."""

    def __init__(self, held: nn.Module) -> None:
        super().__init__()
        self.held = held

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.held(*args, **kwargs)


@attrs.define(eq=False)
class Memory:
    """The state of ``scaled``: a running average of each gradient, how many there were, and a number of the rank."""

    parameters: dict[str, nn.Parameter]
    config: Any
    steps: int = 0
    averages: dict[str, torch.Tensor] = attrs.field(factory=dict)
    events: list[str] = attrs.field(factory=list)

    @classmethod
    def of(cls, parts: list[nn.Module], options: Any) -> Memory:
        named = {name: p for part in parts for name, p in name_root(part).named_parameters()}
        return cls(named, options)

    def part(self) -> RuntimePart:
        return RuntimePart(
            loss_scale=lambda: self.config.scale,
            after_backward=self.unscale,
            before_clip=partial(self.events.append, "before_clip"),
            zero_grad=partial(self.events.append, "zero_grad"),
            close=partial(self.events.append, "close"),
            metrics=lambda: {"steps": float(self.steps)},
            state=PluginState(
                tensors=lambda: {"average": self.averages},
                shared=lambda: {"steps": self.steps},
                own=(lambda: torch.distributed.get_rank()) if self.config.of_rank else None,
                load=self.load,
            ),
        )

    @torch.no_grad()
    def unscale(self) -> None:
        self.steps += 1
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                parameter.grad.div_(self.config.scale)
                before = self.averages.get(name, torch.zeros_like(parameter.grad))
                self.averages[name] = before * 0.5 + parameter.grad * 0.5

    def load(self, saved: Any) -> None:
        self.steps = saved.shared["steps"]
        self.averages = dict(saved.tensors["average"])
        self.events.append(f"loaded of rank {saved.own}")
