"""Let gradients that wait to be reduced be neither clipped nor stepped, and be dropped with all others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from nemo_dist.plugin.hookspecs import RuntimePart

_SHOWN = 3
Named = Iterable[tuple[str, nn.Parameter]]


def waits(parts: Iterable[RuntimePart]) -> bool:
    """Whether gradients wait to be reduced, which then differ between the ranks."""
    return any(True for _ in _waiting(parts))


def refuse(parts: Iterable[RuntimePart], named: Callable[[], Named], what: str, optimizer: Any = None) -> None:
    """Raise RuntimeError, before *what*, where gradients of the parameters *named* gives wait to be reduced.

    With an *optimizer*, of those that it steps.
    """
    waiting = {id(parameter) for parameter, _ in _waiting(parts)}
    if waiting and optimizer is not None:
        waiting &= _stepped(optimizer)
    names = [name for name, parameter in named() if id(parameter) in waiting] if waiting else []
    if names:
        more = f" and {len(names) - _SHOWN} others" if len(names) > _SHOWN else ""
        raise RuntimeError(
            f"{what} found gradients of one rank's rows alone, of {', '.join(names[:_SHOWN])}{more}: they are of a "
            "backward under runtime.no_sync(), or of one that failed, and no backward has reduced them; run the last "
            "backward of a step outside of runtime.no_sync(), or drop them by optimizer.zero_grad()"
        )


def drop(parts: Iterable[RuntimePart], optimizer: Any) -> None:
    """Drop the gradients that wait for the parameters of *optimizer*."""
    own = _stepped(optimizer)
    for parameter, forget in _waiting(parts):
        if id(parameter) in own:
            forget()


def _stepped(optimizer: Any) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _waiting(parts: Iterable[RuntimePart]) -> Iterator[tuple[nn.Parameter, Callable[[], None]]]:
    return (one for part in parts if part.unreduced is not None for one in part.unreduced().items())
