"""transformers' own distribution of a model."""

from __future__ import annotations

from typing import Any

from transformers.distributed import DistributedConfig


def distributed(model: Any, **sizes: int) -> Any:
    """Return *model*, whole on every rank, distributed by ``DistributedConfig(**sizes)``.

    ``from_pretrained(distributed_config=)`` asks for accelerate, to load weights; these are the two calls it makes.
    """
    config, _, manager = type(model).prepare_distribute_model(DistributedConfig(**sizes))
    return type(model).maybe_distribute_model(model, config, manager)
