"""PEFT's LoRA beside the linear layers of a tiny model, with the same values on every rank and on one process."""

from __future__ import annotations

from functools import lru_cache
from typing import Any
from zlib import crc32

import torch
from torch import nn

from nemo_dist.hf_model import blocks
from nemo_dist.testing.tiny_models import SPECIMENS


@lru_cache(maxsize=32)
def targets(specimen: str) -> tuple[str, ...]:
    """Return the names, within a block, of the linear layers in the blocks of *specimen*; often all but experts."""
    found = (block.named_modules() for block in blocks(SPECIMENS[specimen].make()).values())
    linear = {name for named in found for name, module in named if isinstance(module, nn.Linear)}
    return tuple(sorted({name.rpartition(".")[2] for name in linear}))


def adapted(model: Any, specimen: str, setup: Any = None) -> Any:
    """Return *model* with adapters whose values follow from their names; *setup*: the one that it was loaded for."""
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(targets(specimen)))
    model = peft.get_peft_model(model, config) if setup is None else setup.add_adapters(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:  # what PEFT begins with, zeros, hides mistakes
                drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(crc32(name.encode())))
                parameter.copy_(0.1 * drawn)
    return model
