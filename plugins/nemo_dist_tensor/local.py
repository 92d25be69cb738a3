"""Run a module on plain tensors: its parameters, which are DTensors, are replaced by what this rank holds of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from torch import nn

Forward = Callable[..., Any]
Change = Callable[[Tensor], Tensor | None]


def local(parameter: Tensor) -> Tensor:
    """Return what this rank holds of *parameter*; gradients flow back to it."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def replace_forward(module: nn.Module, forward: Forward) -> None:
    """Let calls of *module* run *forward*, inside its hooks."""
    module.forward = forward


@contextmanager
def parameters_as(
    module: nn.Module, change: Change = local, special: Mapping[str, Change] | None = None
) -> Iterator[None]:
    """Within the context the own parameters of *module* are ``change(parameter)``, or ``special[name](parameter)``.

    They are looked up on entry, so that what a strategy has gathered for this forward is what is used.
    """
    changes = special or {}
    originals = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    registered: Any = module._parameters  # holds Parameters; what stands in for one is a tensor computed from it
    registered.update({name: changes.get(name, change)(parameter) for name, parameter in originals.items()})
    try:
        yield
    finally:
        registered.update(originals)
