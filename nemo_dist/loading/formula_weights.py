"""Run a model of any size without its weights, to see how its outputs depend on its inputs.

A copy of the model is built with its parameters on the meta device. While it runs, an operation that reads a parameter
gets values by a formula: the element at offset ``i`` of a storage is ``scale * sin(phase + step * i)``, with a phase
and a step for each storage. A matrix of such values is a product of two thin ones, however it is sliced or transposed,
because ``sin(a + b) = sin(a) cos(b) + cos(a) sin(b)``. So a product with it takes neither its memory nor its time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights
from transformers.modeling_utils import local_torch_dtype as local_dtype

from nemo_dist.hf_model import (
    attention_of,
    compute_experts_one_by_one,
    detach_computed,
    plain_class,
    set_attention,
)
from nemo_dist.torch_private import TorchDispatchMode, storage_id, tensors_in, tree_map_only

_aten = torch.ops.aten
_META = torch.device("meta")
_CPU = torch.device("cpu")
_MOST = 1 << 26  # elements of a parameter that are written out for an operation without a rule


def weightless(model: nn.Module) -> Any:
    """Return a new model of the class and config of *model*, in evaluation mode: parameters on meta, buffers on CPU.

    All of it is float32.
    """
    kind, config = plain_class(model), copy.deepcopy(model.config)
    if attention_of(model) not in ("sdpa", "eager"):
        set_attention(config, "sdpa")  # others need a GPU
    with local_dtype(torch.float32), no_init_weights(), _META:
        made: Any = kind(config)
    compute_experts_one_by_one(made)
    with torch.no_grad(), torch.random.fork_rng([]), local_dtype(torch.float32):
        for module in made.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = _buffer_like(buffer, module)
        made.initialize_weights()  # transformers makes buffers there, as after it has read a checkpoint
    detach_computed(made)
    return made.eval()


def _buffer_like(buffer: Tensor, module: nn.Module) -> Tensor:
    """Return zeros, or positive numbers for modules that transformers does not know; spectral norm divides by some."""
    known = type(module).__module__.startswith("transformers.") or not buffer.is_floating_point()
    numbers = 0.5 + 0.4 * torch.arange(buffer.numel(), device=_CPU).sin().view(buffer.shape)
    return torch.zeros_like(buffer, device=_CPU) if known else numbers.to(buffer.dtype)


class FormulaWeights(TorchDispatchMode):
    """Within the context, meta tensors have values by the formula; what is computed from them is on the CPU."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        matrices = [p for p in model.parameters() if p.ndim > 1]
        self._scales: dict[int, float] = {storage_id(p): p.shape[-1] ** -0.5 for p in matrices}
        self._order: dict[int, int] = {}
        self.on_read: Callable[[list[Tensor]], None] | None = None  # called with the meta tensors of an operation

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = tensors_in((args, kwargs))
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta":
            kwargs["device"] = _CPU
        lazy = [tensor for tensor in given if tensor.is_meta]
        if not lazy or (function.is_view and len(lazy) == len(given)):
            return function(*args, **kwargs)
        if self.on_read is not None:
            self.on_read(lazy)
        rule = _RULES.get(function)
        if rule is not None:
            found = rule(self, *args)
            if found is not None:
                return found
        args, kwargs = tree_map_only(Tensor, self.values, (args, kwargs))
        return function(*args, **kwargs)

    def values(self, tensor: Tensor) -> Tensor:
        """Return *tensor* with its values written out, if it is on meta."""
        if not tensor.is_meta:
            return tensor
        if tensor.numel() > _MOST:
            raise RuntimeError(f"a weight of shape {tuple(tensor.shape)} is used in an operation without a rule")
        angles = self._first(tensor)
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            angles = angles[..., None] + self._step(tensor) * stride * torch.arange(size)
        found = self._scale(tensor) * angles.sin()
        return found.to(tensor.dtype) if tensor.dtype.is_floating_point else torch.zeros_like(tensor, device=_CPU)

    def product(self, left: Tensor, weight: Tensor) -> Tensor:
        """Return ``left @ weight`` for a *weight* on meta of two dims, or of three like *left*."""
        step = self._step(weight)
        rows, columns = (step * weight.stride(d) * torch.arange(weight.shape[d]) for d in (-2, -1))
        first = self._first(weight)
        if weight.ndim == 3:
            first = (first + step * weight.stride(0) * torch.arange(weight.shape[0]))[:, None]
        rows = rows + first
        thin = torch.stack((rows.sin(), rows.cos()), dim=-1).to(left.dtype)
        wide = torch.stack((columns.cos(), columns.sin())).to(left.dtype)
        return self._scale(weight) * (left @ thin @ wide)

    def rows(self, weight: Tensor, index: Tensor) -> Tensor:
        """Return the rows of *weight* at *index*, as an embedding does."""
        angles = self._first(weight) + self._step(weight) * weight.stride(0) * index
        for size, stride in zip(weight.shape[1:], weight.stride()[1:], strict=True):
            angles = angles[..., None] + self._step(weight) * stride * torch.arange(size)
        return (self._scale(weight) * angles.sin()).to(weight.dtype)

    def _first(self, tensor: Tensor) -> Tensor:
        return torch.tensor(1.0 + self._number(tensor) + self._step(tensor) * tensor.storage_offset()).double()

    def _step(self, tensor: Tensor) -> float:
        return 0.5 + self._number(tensor) * 0.6180339887498949 % 2.0

    def _number(self, tensor: Tensor) -> int:
        return self._order.setdefault(storage_id(tensor), len(self._order))

    def _scale(self, tensor: Tensor) -> float:
        return self._scales.get(storage_id(tensor), 1.0)


def _mm(mode: FormulaWeights, left: Tensor, right: Tensor) -> Tensor | None:
    if left.is_meta and right.is_meta:
        return None
    if right.is_meta:
        return mode.product(left, right)
    return mode.product(right.mT, left.mT).mT


def _addmm(mode: FormulaWeights, bias: Tensor, left: Tensor, right: Tensor) -> Tensor | None:
    found = _mm(mode, left, right) if left.is_meta or right.is_meta else left @ right
    return None if found is None else mode.values(bias) + found


def _embedding(mode: FormulaWeights, weight: Tensor, index: Tensor, *rest: Any) -> Tensor:
    return mode.rows(weight, index)


def _index(mode: FormulaWeights, weight: Tensor, indices: list[Tensor | None]) -> Tensor | None:
    first = indices[0]
    if len(indices) > 1 or first is None or first.dtype == torch.bool or not weight.is_meta:
        return None
    return mode.rows(weight, first)


_RULES: dict[Any, Any] = {
    _aten.mm.default: _mm,
    _aten.bmm.default: _mm,
    _aten.addmm.default: _addmm,
    _aten.baddbmm.default: _addmm,
    _aten.embedding.default: _embedding,
    _aten.index.Tensor: _index,
}
