"""Give DoRA's magnitudes their first values where ranks hold parts of the same matrices: the norms of whole rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nemo_dist.mesh.dtensor import from_local, local


@torch.no_grad()
def fill_magnitudes(made: nn.Module, device: torch.device) -> None:
    """Fill the magnitudes in *made*, of a model whose weights are shards again, as PEFT does from whole weights.

    One weight is whole at a time. Collective over the ranks that share it. Raises ValueError for DoRA beside other
    layers than linear ones.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.variants import DoraLinearVariant

    found: list[tuple[str, Any]] = [(name, one) for name, one in made.named_modules() if isinstance(one, LoraLayer)]
    for name, layer in found:
        for adapter, magnitude in layer.lora_magnitude_vector.items():
            variant = layer.lora_variant[adapter]
            if type(variant) is not DoraLinearVariant:
                raise ValueError(
                    f"{name} is of a kind ({type(variant).__name__}) that is not proven where ranks hold parts of "
                    "matrices; use DoRA beside linear layers only"
                )
            whole = _whole(layer.get_base_layer().weight, device)
            product = _in(whole, layer.lora_B[adapter].weight) @ _in(whole, layer.lora_A[adapter].weight)
            norm = magnitude.get_weight_norm(weight=whole, lora_weight=product, scaling=layer.scaling[adapter])
            magnitude.weight.copy_(norm)


def _whole(weight: Tensor, device: torch.device) -> Tensor:
    if not isinstance(weight, DTensor):
        return weight.to(device)
    shard = from_local(local(weight).to(device), weight.device_mesh, weight.placements, like=weight)
    return shard.full_tensor()


def _in(weight: Tensor, matrix: Any) -> Tensor:
    """Return *matrix* in the dtype of *weight*, in which PEFT draws it before it casts it to a wider one."""
    found: Tensor = matrix.to(weight)
    return found
