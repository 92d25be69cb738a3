"""Let gradients that wait to be reduced be neither clipped nor stepped, and be dropped with all others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any
from weakref import WeakSet

import attrs
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from nemo_dist.plugin.hookspecs import RuntimePart
from nemo_dist.training.parameters import named_shards

_SHOWN = 3
_watched: WeakSet[Waiting] = WeakSet()


@attrs.frozen(eq=False, slots=False)
class Waiting:
    """The gradients of ``model_parts`` that wait to be reduced, as the ``parts`` of plugins say."""

    parts: Sequence[RuntimePart]
    model_parts: Sequence[nn.Module]

    def watch(self) -> None:
        """Refuse steps of such gradients from now on, also of optimizers that know nothing of them."""
        if any(part.unreduced is not None for part in self.parts):
            _watched.add(self)
            _hear_of_steps()

    def __bool__(self) -> bool:
        """Whether there are any, which then differ between the ranks."""
        return any(True for _ in self._found())

    def refuse(self, what: str, optimizer: Any = None) -> None:
        """Raise RuntimeError, before *what*, where there are any; with an *optimizer*, of parameters that it steps."""
        waiting = {id(parameter) for parameter, _ in self._found()}
        if waiting and optimizer is not None:
            waiting &= _stepped(optimizer)
        named = named_shards(self.model_parts) if waiting else ()
        names = [name for name, parameter in named if id(parameter) in waiting]
        if names:
            more = f" and {len(names) - _SHOWN} others" if len(names) > _SHOWN else ""
            raise RuntimeError(
                f"{what} found gradients of one rank's rows alone, of {', '.join(names[:_SHOWN])}{more}: they are of a "
                "backward under runtime.no_sync(), or of one that failed, and no backward has reduced them; run the "
                "last backward of a step outside of runtime.no_sync(), or drop them by optimizer.zero_grad()"
            )

    def drop(self, optimizer: Any) -> None:
        """Drop those of the parameters of *optimizer*."""
        own = _stepped(optimizer)
        for parameter, forget in self._found():
            if id(parameter) in own:
                forget()

    def _found(self) -> Iterator[tuple[nn.Parameter, Callable[[], None]]]:
        return (one for part in self.parts if part.unreduced is not None for one in part.unreduced().items())


def _stepped(optimizer: Any) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


@cache
def _hear_of_steps() -> None:
    register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: Optimizer, *_: Any) -> None:
    for waiting in list(_watched):
        waiting.refuse("optimizer.step()", optimizer)
