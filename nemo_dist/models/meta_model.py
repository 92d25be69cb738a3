"""Make a model of a config on the meta device: every module and shape, and no weight."""

from __future__ import annotations

import os
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM


def meta_model(source: str | os.PathLike[str]) -> Any:
    """Return the model that *source* describes: a folder, a config file, or a name on the hub; no weight is read.

    Its class is the architecture that the config names, or else the one for causal models; its dtype is the config's.
    """
    config = AutoConfig.from_pretrained(source)
    names = getattr(config, "architectures", None) or [""]
    kind = getattr(transformers, names[0], None)
    with torch.device("meta"):
        model: Any = kind(config) if kind else AutoModelForCausalLM.from_config(config)
    return model.to(config.dtype) if config.dtype else model
