"""Merge PEFT's adapters into a sharded model for as long as it is exported: each rank adds its part to its shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from nemo_dist.checkpoint.chunks import chunks
from nemo_dist.checkpoint.sharded_model import ShardedModel
from nemo_dist.errors import CheckpointError
from nemo_dist.hf_model import inner_model, name_root
from nemo_dist.plugin.resharding import reshard


@contextmanager
def merged(sharded: ShardedModel) -> Iterator[ShardedModel]:
    """Yield *sharded* as it is without PEFT, with its adapters merged into the weights; afterwards all is as before.

    Without adapters it is yielded unchanged. Raises CheckpointError for adapters that are no sum of matrices.
    """
    wrapped = [part for part in sharded.parts if name_root(part) is not inner_model(part)]
    if not wrapped:
        yield sharded
        return
    reshard(sharded.parts)
    models = tuple(inner_model(part) for part in sharded.parts)
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(_merged(model))
        yield attrs.evolve(sharded, parts=models)


@contextmanager
def _merged(model: nn.Module) -> Iterator[None]:
    """Within the context, each layer with adapters in *model* is its base layer, with their product in its weight."""
    layers = _layers(model)
    before: list[tuple[Tensor, Tensor]] = []
    try:
        for name, layer in layers.items():
            base = _base(layer)
            for adapter in () if _in_place(layer) or layer.merged else _active(layer):
                _add(base.weight, layer.get_delta_weight(adapter), before)
            _replace(model, name, base)
        yield
    finally:
        for name, layer in layers.items():
            _replace(model, name, layer)
        with torch.no_grad():
            for values, old in reversed(before):
                values.copy_(old)


@torch.no_grad()
def _add(weight: Tensor, whole: Tensor, before: list[tuple[Tensor, Tensor]]) -> None:
    """Add this rank's chunks of the *whole* tensor to *weight*; keep the values in *before*, as a sum may round."""
    for chunk, values in chunks(weight):
        before.append((values, values.clone()))
        values.add_(chunk.of(whole.to(values.device)))


def _layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers that PEFT put into *model*, by name; raise CheckpointError for those that are no LoRA alone."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found: dict[str, Any] = {}
    problems: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            found[name] = module
            problems += _problems(model, name, module)
    if problems:
        raise CheckpointError(
            "a model with these adapters of PEFT cannot be exported: "
            + "; ".join(problems[:3])
            + ". Save the adapters "
            "with save_pretrained of PEFT's model, and merge them on one process with merge_and_unload()"
        )
    return found


def _strange(name: str, module: object) -> str:
    return f"{name} is a {type(module).__module__}.{type(module).__name__}"


def _problems(model: nn.Module, name: str, layer: Any) -> Sequence[str]:
    """Say what in a layer of PEFT is more than a product that is added to a weight of its own, or a module itself."""
    from peft.tuners.lora import LoraLayer

    if _in_place(layer):
        return [] if layer.active else [f"{name} was trained in place by an adapter that is not active"]
    if not isinstance(layer, LoraLayer):
        return [_strange(name, layer)]
    base: Any = layer.get_base_layer()
    plain = isinstance(getattr(base, "weight", None), Tensor) and hasattr(layer, "get_delta_weight")
    others = [adapter for adapter in _active(layer) if adapter in layer.lora_variant or layer.lora_bias.get(adapter)]
    if not plain or others:
        return [_strange(name, layer)]
    rest = (module for module in model.modules() if module is not base)
    tied = _active(layer) and any(
        base.weight is parameter for module in rest for parameter in module.parameters(recurse=False)
    )
    return [f"{name} is an adapter of a weight that other modules use too (it is tied)"] if tied else []


def _base(layer: Any) -> Any:
    """Return the module of the model that *layer* of PEFT wraps."""
    return layer.original_module if _in_place(layer) else layer.get_base_layer()


def _in_place(layer: Any) -> bool:
    """Whether *layer* is a ``ModuleInPlace``, whose module has no PEFT."""
    return getattr(type(layer), "in_place", False)


def _active(layer: Any) -> list[str]:
    """Return the names of the adapters that the forward of *layer* adds."""
    if layer.disable_adapters:
        return []
    return [adapter for adapter in layer.active_adapters if adapter in layer.scaling]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)
