"""Make one optimizer over the shards of all parts of a model, the same on every rank."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import attrs
from torch import Tensor
from torch.optim import Optimizer

from nemo_dist.checkpoint.changed_optimizer import watch_steps
from nemo_dist.checkpoint.optimizer_state import placed
from nemo_dist.checkpoint.sharded_model import ShardedModel
from nemo_dist.mesh.store_consensus import compare, refuse_unequal
from nemo_dist.plugin.hookspecs import RuntimePart
from nemo_dist.training.grad_norm import one_mesh_per_group
from nemo_dist.training.optimizer_probe import keeps_state, refuse_what_mixes_elements, warn_of_lost_updates
from nemo_dist.training.parameters import named_as_they_are, named_shards
from nemo_dist.training.peft_adapters import refuse_unaveraged
from nemo_dist.training.unreduced import Waiting


@attrs.frozen(kw_only=True)
class OptimizerMaker:
    """Makes optimizers for the parts of *sharded*, whose ``zero_grad`` drops what is ``waiting`` too.

    ``before_step`` is called with each before it steps.
    """

    sharded: ShardedModel
    plugins: Mapping[str, RuntimePart]
    waiting: Waiting
    before_step: Callable[..., None]

    def make(self, kind: type[Optimizer], params: Iterable[Any] | None, options: Mapping[str, Any]) -> Any:
        """Return an optimizer of *kind* over *params*, with *options*; as :meth:`nemo_dist.Runtime.optimizer` says."""
        ranks, mesh, parts = self.sharded.ranks, self.sharded.mesh, self.sharded.parts
        told = {"type": f"{kind.__module__}.{kind.__qualname__}"}
        compare("the optimizer", told | {name: _plain(value) for name, value in options.items()}, ranks.ranks)
        if params is None:
            params = [parameter for _, parameter in named_shards(parts) if parameter.requires_grad]
        groups = one_mesh_per_group(self._shards_of(params))
        if not ranks.total([any(group["params"] for group in groups)])[0]:
            raise ValueError("the optimizer got no parameters on any rank; pass some, or let some require gradients")
        refuse_unaveraged(named_as_they_are(parts), groups, mesh)
        self._compare_groups(groups)
        warn_of_lost_updates(groups)
        refuse_what_mixes_elements(kind, groups, options, mesh)
        optimizer: Any = kind(groups, **options)
        optimizer.register_step_pre_hook(self.before_step)
        optimizer.register_load_state_dict_pre_hook(placed)
        return self._with_plugins(optimizer, keeps_state(kind, options))

    def _with_plugins(self, optimizer: Any, keeps: bool) -> Any:
        """Return what plugins make of *optimizer*, whose ``zero_grad`` drops the gradients that they keep too."""
        by = [name for name, part in self.plugins.items() if part.optimizer is not None]
        parts = tuple(self.plugins.values())
        for part in parts:
            optimizer = part.optimizer(optimizer) if part.optimizer else optimizer
        if by:
            watch_steps(optimizer, by, keeps)
        droppers = [part.zero_grad for part in parts if part.zero_grad is not None]
        if any(part.unreduced is not None for part in parts):
            droppers.append(partial(self.waiting.drop, optimizer))
        return _dropping_gradients_of(optimizer, droppers) if droppers else optimizer

    def _compare_groups(self, groups: Iterable[Mapping[str, Any]]) -> None:
        """Raise RankError where ranks that have a parameter put it into unlike groups, or only some of them into one.

        Ranks of other stages have other parameters.
        """
        chosen = {
            id(parameter): {"a step": "taken"} | {key: _plain(value) for key, value in group.items() if key != "params"}
            for group in groups
            for parameter in group["params"]
        }

        def told() -> str:
            named = named_shards(self.sharded.parts)
            return json.dumps({name: chosen.get(id(one), {"a step": "left out"}) for name, one in named})

        shares = self.sharded.ranks.distinct("making the optimizer", told)
        refuse_unequal("the optimizer", [(ranks, json.loads(text)) for ranks, text in shares])

    def _shards_of(self, params: Iterable[Any]) -> list[Any]:
        """Return *params*, parameters or groups of them, with the shard in place of each that a forward gathered."""
        listed = dict(named_as_they_are(self.sharded.parts))
        shards = dict(named_shards(self.sharded.parts))
        shard = {id(parameter): shards[name] for name, parameter in listed.items()}

        def own(given: Iterable[Any]) -> list[Any]:
            return [shard.get(id(parameter), parameter) for parameter in given]

        given = list(params)
        if given and isinstance(given[0], dict):
            return [{**group, "params": own(group["params"])} for group in given]
        return own(given)


def _plain(value: Any) -> str:
    """Return the text of a number, text or tuple of them; of other values the type, as their text has addresses."""
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_plain, value))})"
    if isinstance(value, Tensor) and value.numel() == 1:
        return repr(value.item())
    return repr(value) if isinstance(value, bool | int | float | str | None) else type(value).__qualname__


def _dropping_gradients_of(optimizer: Any, droppers: Sequence[Callable[[], None]]) -> Any:
    """Make ``zero_grad`` of *optimizer* also call *droppers*, which drop the gradients that plugins keep."""
    found = optimizer.zero_grad

    def zero_grad(*args: Any, **kwargs: Any) -> None:
        found(*args, **kwargs)
        for drop in droppers:
            drop()

    optimizer.zero_grad = zero_grad
    return optimizer
