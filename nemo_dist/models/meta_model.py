"""Make a model of a config on the meta device: every module and shape, and no weight."""

from __future__ import annotations

import copy
import os
from functools import partial
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig
from transformers.initialization import no_init_weights
from transformers.modeling_utils import local_torch_dtype

_AUTO: tuple[tuple[Any, Any], ...] = (
    (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.AutoModelForCausalLM),
    (transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, transformers.AutoModelForImageTextToText),
    (transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, transformers.AutoModelForSequenceClassification),
)


def meta_model(source: str | os.PathLike[str] | PreTrainedConfig, dtype: torch.dtype | None = None) -> Any:
    """Return the model that *source* describes: a config, its folder or file, or a name on the hub; reads no weight.

    Its class is the architecture that the config names, or else the one that the config is for, first of all for causal
    models. Parameters are of *dtype*, or else of the config's, or float32. Raises ValueError where it is of no language
    model.
    """
    config = copy.deepcopy(source) if isinstance(source, PreTrainedConfig) else AutoConfig.from_pretrained(source)
    names = getattr(config, "architectures", None) or [""]
    kind = getattr(transformers, names[0], None)
    stored = dtype or config.dtype or torch.float32
    known = [partial(auto.from_config, dtype=stored) for mapping, auto in _AUTO if type(config) in mapping]
    makers = [kind] if kind else known
    if not makers:
        raise ValueError(
            f"{type(config).__name__} names no architecture and is of no language model; known are the models of "
            f"{', '.join(auto.__name__ for _, auto in _AUTO)}"
        )
    with local_torch_dtype(stored), no_init_weights(), torch.device("meta"):
        model: Any = makers[0](config)
    model.tie_weights()
    return model
