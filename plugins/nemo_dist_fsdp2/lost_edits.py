"""Find edits of weights that no shard has: of parameters that a forward left gathered, and by ``p.data = x``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from nemo_dist.torch_private import changes_in_place, held_by, storage_id
from nemo_dist_fsdp2.groups import Place, strangers


class _Gathered(nn.Parameter):
    """A gathered parameter, writes to whose ``data`` count as those to ``detach()`` do."""

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        setter: Any = Tensor.data
        setter.__set__(self, value)


def _refuse_gathered(optimizer: Optimizer, *_: Any) -> None:
    """Raise RuntimeError for a step of gathered parameters, whose gradients go to the shards."""
    if any(type(one) is _Gathered for group in optimizer.param_groups for one in group["params"]):
        raise RuntimeError(
            "the optimizer was made of parameters that a forward had left gathered, which get no gradient; make it by "
            "runtime.optimizer(), or of what runtime.named_parameters() gives"
        )


@cache
def _watch_optimizers() -> None:
    register_optimizer_step_pre_hook(_refuse_gathered)


@attrs.define(eq=False)
class LostEdits:
    """The edits of parameters of *groups*; those of ``data`` of what is gathered only with ``of_data``.

    ``gathered``: what a forward left so, with its changes and storage. ``assigned``: of each shard the local tensor and
    the storage of the DTensor around it, which ``p.data = x`` replaces while the local tensor stays.
    """

    groups: list[Any]
    of_data: bool
    gathered: list[tuple[Place, nn.Parameter, tuple[int, int]]] = attrs.field(factory=list)
    assigned: dict[nn.Parameter, tuple[Tensor, int]] = attrs.field(factory=dict)

    def __attrs_post_init__(self) -> None:
        _watch_optimizers()

    def left_by_forward(self, *_: Any) -> None:
        """Remember what a forward, also one that failed, left gathered."""
        if torch.is_grad_enabled():
            found = [(place, one) for place in strangers(self.groups) for one in _at(place)]
            if self.of_data:
                for _, one in found:
                    if type(one) is nn.Parameter:
                        one.__class__ = _Gathered
            self.gathered = [(place, one, _written(one)) for place, one in found]

    def of_gathered(self) -> list[Place]:
        """Return where a parameter that is gathered now was changed since then, and forget what was."""
        found, self.gathered = self.gathered, []
        return [where for where, one, before in found if _is_at(one, where) and _written(one) != before]

    def of_shards(self, shards: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Return those of *shards* whose ``data`` was assigned since they were first seen here."""
        return [shard for shard in shards if self._assigned(shard)]

    def _assigned(self, shard: nn.Parameter) -> bool:
        held, stored = held_by(shard), storage_id(shard)
        before = self.assigned.get(shard)
        if before is None or before[0] is not held:  # another one by now, by ``model.to`` for example
            self.assigned[shard] = held, stored
            return False
        return before[1] != stored and held is not shard


def _written(parameter: nn.Parameter) -> tuple[int, int]:
    return changes_in_place(parameter), storage_id(parameter)


def _at(place: Place) -> Iterator[nn.Parameter]:
    module, name = place
    found = module._parameters.get(name)
    if found is not None:
        yield found


def _is_at(parameter: nn.Parameter, place: Place) -> bool:
    return any(one is parameter for one in _at(place))
