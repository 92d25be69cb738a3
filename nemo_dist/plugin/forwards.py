"""Wrap the forward of a module, so that several plugins can wrap the same one."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def wrap_forward(module: nn.Module, around: Callable[..., Any]) -> None:
    """Replace the forward of *module* by ``around(forward, *args, **kwargs)``, where *forward* is the current one.

    Plugins nest: each wraps the forward that earlier plugins left. Hooks of *module* still run outside, and the
    signature of its forward stays the same.
    """
    found = module.forward

    @wraps(found)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return around(found, *args, **kwargs)

    module.forward = forward
