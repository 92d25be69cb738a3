"""Estimate what a rank holds: parameters by name and shape, and bytes of other kinds, as plugins divide them; no torch.

The ``memory`` hooks edit a list of :class:`RankShare` in stage order, as the ``shard`` hooks edit a list of parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from types import MappingProxyType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import attrs

from nemo_dist import hf_model

T = TypeVar("T")
Shape = tuple[int, ...]
MOMENTS = 2  # AdamW keeps two numbers for each of a parameter, in its dtype
STEP_BYTES = 4  # and a count of steps for each parameter


@attrs.frozen(kw_only=True)
class StageShare:
    """The part of the model that a rank runs in one go: the whole model, or one stage of a pipeline.

    ``blocks``: the names of its repeated blocks. ``first``, ``last``: whether it runs what stands before all blocks,
    and what stands after them (head and loss). ``alive``: for how many microbatches it holds activations at the moment
    when this rank holds most.
    """

    blocks: tuple[str, ...]
    first: bool = True
    last: bool = True
    alive: int = 1


@attrs.define(kw_only=True, eq=False)
class RankShare:
    """What a rank holds; ranks that differ in nothing but a pipeline coordinate have one each.

    ``computed``: by name, the shapes of the parameters as its modules compute with them. ``stored``: as it keeps them
    between forwards, with gradient and optimizer state of the same shapes: those of the first rank, which holds most.
    ``added``: those of adapters, which it keeps whole. ``frozen``: which of all these get no gradient.
    ``itemsize``: bytes per number, by name. ``stages``: what it runs. ``rows``, ``length``: the batch of one forward,
    in sequences and in tokens that this rank has of each. ``forwards``: how many such batches make a step. ``idle``:
    the share of the time that it waits for other ranks of the pipeline. ``bytes``: whatever else it holds at the moment
    when it holds most, by what that is; ``bytes_per_token``: the same for each token of ``length``, which a plugin
    that acts later may shorten. ``overridden``: the parameters that the strategy does not shard.
    """

    computed: dict[str, Shape]
    stored: dict[str, Shape]
    itemsize: Mapping[str, int]
    stages: tuple[StageShare, ...]
    rows: int
    length: int
    forwards: int = 1
    idle: float = 0.0
    bytes: dict[str, int] = attrs.field(factory=dict)
    bytes_per_token: dict[str, int] = attrs.field(factory=dict)
    overridden: set[str] = attrs.field(factory=set)
    added: dict[str, Shape] = attrs.field(factory=dict)
    frozen: frozenset[str] = frozenset()

    @classmethod
    def whole(cls, model: Any, rows: int, length: int, added: Mapping[str, Any] = MappingProxyType({})) -> RankShare:
        """Return the share of a rank that does everything with *model*, and *added* parameters; it may be on meta."""
        parameters, blocks = _shapes(model)
        own = {name: shape for name, (shape, _) in parameters.items()}
        sizes = {name: size for name, (_, size) in parameters.items()}
        every = (*model.named_parameters(), *added.items())  # what is frozen may change, so it is not kept
        return cls(
            computed=own,
            stored=dict(own),
            added={name: tuple(parameter.shape) for name, parameter in added.items()},
            frozen=frozenset(name for name, parameter in every if not parameter.requires_grad),
            itemsize=sizes | {name: parameter.itemsize for name, parameter in added.items()},
            stages=(StageShare(blocks=blocks),),
            rows=rows,
            length=length,
        )

    def cut(self, name: str, dim: int, ranks: int) -> None:
        """Let *ranks* ranks hold a part each of the parameter *name* along *dim*, and compute with that."""
        if name in self.computed:
            self.computed[name] = first_part(self.computed[name], dim, ranks)
            self.stored[name] = first_part(self.stored[name], dim, ranks)

    def shard(self, name: str, dim: int, ranks: int) -> None:
        """Let *ranks* ranks keep a part each of the parameter *name*, which is whole again when its module runs."""
        if name in self.stored:
            self.stored[name] = first_part(self.stored[name], dim, ranks)

    def computed_bytes(self, names: Iterable[str], itemsize: int | None = None) -> int:
        """Return the bytes of the parameters *names* as modules compute with them, in *itemsize* bytes per number."""
        held = (name for name in names if name in self.computed)
        return sum(math.prod(self.computed[name]) * (itemsize or self.itemsize[name]) for name in held)

    def trained(self, names: Iterable[str]) -> list[str]:
        """Return those of the parameters *names* that get gradients."""
        return [name for name in names if name not in self.frozen]

    @property
    def stored_bytes(self) -> int:
        """The bytes of the parameters of the model that it keeps."""
        return self._bytes(self.stored)

    @property
    def gradient_bytes(self) -> int:
        """The bytes of the gradients of those parameters."""
        return self._bytes(self.trained(self.stored))

    def _bytes(self, names: Iterable[str]) -> int:
        shapes = {**self.added, **self.stored}
        return sum(math.prod(shapes[name]) * self.itemsize[name] for name in names)

    @property
    def states(self) -> dict[str, int]:
        """The bytes of parameters and adapters, of gradients, and of the state of AdamW, in the dtype of parameters."""
        held = [*self.stored, *self.added]
        trained = self.trained(held)
        gradients = self._bytes(trained)
        return {
            "parameters": self._bytes(held),
            "gradients": gradients,
            "optimizer state": MOMENTS * gradients + STEP_BYTES * len(trained),
        }

    @property
    def held(self) -> dict[str, int]:
        """The bytes of all that it holds beside activations; to be read when every plugin has answered."""
        by_length = {what: count * self.length for what, count in self.bytes_per_token.items()}
        return {**self.states, **self.bytes, **by_length}


def first_part(shape: Shape, dim: int, ranks: int) -> Shape:
    """Return the shape of the first of *ranks* parts of a tensor along *dim*, as ``torch.chunk`` divides it."""
    return (*shape[:dim], -(-shape[dim] // ranks), *shape[dim + 1 :])


def once_per_model(function: Callable[..., T]) -> Callable[..., T]:
    """Keep what *function* returns or raises for a model, its first argument, and the further, hashable arguments.

    A search asks the same of one model for thousands of plans.
    """
    kept: WeakKeyDictionary[Any, dict[Any, tuple[bool, Any]]] = WeakKeyDictionary()

    @wraps(function)
    def cached(model: Any, *args: Any) -> T:
        known = kept.setdefault(model, {})
        if args not in known:
            try:
                known[args] = True, function(model, *args)
            except ValueError as refusal:
                known[args] = False, refusal
        answered, value = known[args]
        if not answered:
            raise value
        found: T = value
        return found

    return cached


@once_per_model
def _shapes(model: Any) -> tuple[dict[str, tuple[Shape, int]], tuple[str, ...]]:
    """Return the shape and the bytes per number of every parameter of *model*, each once, and the names of blocks."""
    parameters = {name: (tuple(p.shape), p.element_size()) for name, p in model.named_parameters()}
    return parameters, tuple(hf_model.blocks(model))
