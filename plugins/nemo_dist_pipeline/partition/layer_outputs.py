"""Of outputs that have a value for each layer, give those of the last stage only what is right: the last value."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NoReturn

import attrs
from transformers.utils import ModelOutput

BY_LAYER = ("hidden_states", "attentions", "router_logits")  # ends of the names of such outputs


@attrs.frozen(eq=False)
class LastOf:
    """Stands for values by layer, of which the last stage has its own: ``[-1]`` is that of the last layer."""

    name: str
    last: Any

    def __getitem__(self, index: Any) -> Any:
        return self.last if index == -1 and self.last is not None else self._refuse()

    def changed(self, change: Callable[[Any], Any]) -> LastOf:
        """Return it with what *change* makes of the value; nothing of one that it leaves, as that has no rows."""
        found = change(self.last)
        return LastOf(self.name, None if found is self.last else found)

    def __iter__(self) -> NoReturn:
        self._refuse()

    def __len__(self) -> NoReturn:
        self._refuse()

    def __bool__(self) -> bool:
        return True

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ValueError(
            f"outputs.{self.name} has values of all layers, and under pp no rank has those of other stages; read only "
            f"outputs.{self.name}[-1], or train with pp_size=1"
        )


def of_last_stage(output: Any) -> Any:
    """Put a ``LastOf`` in place of the values by layer in *output*, that of the last stage.

    A single tensor of such a name (the hidden states of images, say) comes of towers, which other stages have: it is
    left out.
    """
    if not isinstance(output, ModelOutput):
        return output
    for name in [name for name in output if name.endswith(BY_LAYER)]:
        value = output[name]
        found = LastOf(name, value[-1]) if isinstance(value, tuple | list) and value else None
        if found is None:
            OrderedDict.__delitem__(output, name)  # ModelOutput's own refuses
        else:
            OrderedDict.__setitem__(output, name, found)
        object.__setattr__(output, name, found)
    return output
