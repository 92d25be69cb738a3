"""Stand for a block of a model that is not there, with what a model's forward reads of its blocks."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn


class StandIn(nn.Module):
    """The base of modules that stand for a block; the plain attributes of the block (``attention_type``) stay."""

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__()
        plain = {name: value for name, value in vars(replaced).items() if isinstance(value, str | int | float)}
        self.__dict__.update({name: value for name, value in plain.items() if not name.startswith("_")})
        same = isinstance(replaced, StandIn)
        self._signature: inspect.Signature = replaced._signature if same else inspect.signature(replaced.forward)

    def given(self, args: Any, kwargs: Any) -> dict[str, Any]:
        """Return the arguments of a call by name; the first ones are the hidden states."""
        return dict(self._signature.bind(*args, **kwargs).arguments)

    def hidden(self, args: Any, kwargs: Any) -> Any:
        """Return the hidden states among the arguments of a call."""
        return next(iter(self.given(args, kwargs).values()))
