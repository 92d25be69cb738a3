"""Change what a module computes: the one way in which plugins put something around a forward."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def wrap_forward(module: nn.Module, around: Callable[..., Any]) -> None:
    """Run ``around(forward, *args, **kwargs)`` where *module* is called; *forward* is the one that it has now.

    So plugins nest: each wraps what those before it have put there, and none is lost. Hooks of *module* stay outside,
    and its signature stays what it was.
    """
    found = module.forward

    @wraps(found)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return around(found, *args, **kwargs)

    module.forward = forward
