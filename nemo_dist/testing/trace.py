"""Record what the modules of a model put out in a forward, and the gradients of that in the backward, in order.

Only hooks on modules and tensors are used, and nothing is replaced, so the run computes what it computes without them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nemo_dist.torch_private import in_backward, tensors_in

INPUT, OUTPUT, GRADIENT, RECOMPUTED = "input", "output", "gradient of the output", "recomputed output"


@attrs.frozen
class Site:
    """One tensor that is recorded: the ``leaf``-th that comes out of ``module``, or an argument of it by its name."""

    what: str
    module: str
    leaf: int | str


@attrs.define(eq=False)
class Trace:
    """The tensors of one model, or of one part of it on a rank, by site in the order of the run.

    ``values`` has one tensor for each call of the module. ``readers`` maps the module and leaf of an output to the
    modules that were called with it. ``parameters`` are the names that the model has.
    """

    values: dict[Site, list[Tensor]] = attrs.field(factory=dict)
    readers: dict[tuple[str, int], list[str]] = attrs.field(factory=dict)
    parameters: frozenset[str] = frozenset()

    def calls(self, site: Site, count: int = 1) -> list[Tensor]:
        """Return the tensors at *site* for *count* calls of the module; those of microbatches are joined along dim 0.

        Empty when the number of calls here is no multiple of *count*.
        """
        values = self.values.get(site, [])
        if not values or len(values) % count:
            return []
        return [values[call] if len(values) == count else torch.cat(values[call::count]) for call in range(count)]

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Record every module of *model* while the context is open."""
        self.parameters = frozenset(name for name, _ in model.named_parameters(remove_duplicate=False))
        made: dict[int, tuple[Tensor, str, int]] = {}  # holds the tensors, so that no other one gets the same id
        handles = []
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(self._reading(name, made), with_kwargs=True))
            handles.append(module.register_forward_hook(self._leaving(name, made)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _reading(self, name: str, made: Mapping[int, tuple[Tensor, str, int]]) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
            if not torch.is_grad_enabled() or in_backward():
                return
            for argument, value in (*enumerate(args), *kwargs.items()):
                for leaf, tensor in enumerate(tensors_in(value)):
                    if id(tensor) in made:
                        readers = self.readers.setdefault(made[id(tensor)][1:], [])
                        readers += [] if name in readers else [name]
                    if _counts(tensor):
                        self._add(Site(INPUT, name, f"{argument}.{leaf}"), tensor)

        return hook

    def _leaving(self, name: str, made: dict[int, tuple[Tensor, str, int]]) -> Any:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            if not torch.is_grad_enabled():
                return  # a forward that belongs to no step: a probe, or one that only counts
            again = in_backward()
            for leaf, tensor in enumerate(tensors_in(output)):
                if not _counts(tensor):
                    continue
                self._add(Site(RECOMPUTED if again else OUTPUT, name, leaf), tensor)
                if not again:
                    made[id(tensor)] = (tensor, name, leaf)
                if tensor.requires_grad and not again:
                    tensor.register_hook(self._gradient(Site(GRADIENT, name, leaf)))

        return hook

    def _gradient(self, site: Site) -> Any:
        return lambda gradient: None if gradient is None else self._add(site, gradient)  # torch gives None for zeros

    def _add(self, site: Site, tensor: Tensor) -> None:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        self.values.setdefault(site, []).append(local.detach().clone().cpu())


def _counts(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dim() > 0


def is_complete(name: str, here: frozenset[str], whole: frozenset[str]) -> bool:
    """Whether a part with the parameters *here* has all parameters that module *name* of the *whole* model has.

    The outer modules of a pipeline stage lack some, and so does what stands there for a module of another stage.
    """
    start = f"{name}." if name else ""
    return all(parameter in here for parameter in whole if parameter.startswith(start))
