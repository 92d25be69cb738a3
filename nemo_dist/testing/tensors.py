"""Gather sharded tensors, read saved weights, and slice the batch of a rank."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from nemo_dist.training.runtime import Runtime


def whole(tensor: Tensor) -> Tensor:
    """Return a copy of the whole *tensor* on the CPU; for a DTensor, gather its shards, a collective on its mesh."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone().cpu()


def rows_of_rank(batch: Mapping[str, Tensor], runtime: Runtime) -> dict[str, Tensor]:
    """Return the rows of the global *batch* that this rank trains on; ranks with the same ``dp_rank`` get the same."""
    return {name: value.chunk(runtime.dp_size)[runtime.dp_rank] for name, value in batch.items()}


def of_batch(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a batch of nested lists, such as ``strategies.batches()`` draws."""
    return {name: torch.tensor(value) for name, value in batch.items()}


def saved_weights(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of all safetensors files in *folder*, by name."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
