"""Make a model of a config on the meta device: every module and shape, and no weight."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig
from transformers.initialization import no_init_weights
from transformers.modeling_utils import local_torch_dtype

from nemo_dist.planning.validation import shown
from nemo_dist.setup.file_names import near_file

_AUTO: tuple[tuple[Any, Any], ...] = (
    (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.AutoModelForCausalLM),
    (transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, transformers.AutoModelForImageTextToText),
    (transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, transformers.AutoModelForSequenceClassification),
)
_LONGEST = 300  # characters of an error of transformers


def meta_model(
    source: str | os.PathLike[str] | PreTrainedConfig, dtype: torch.dtype | None = None, auto: Any = None
) -> Any:
    """Return the model that *source* describes: a config, its folder or file, or a name on the hub; reads no weight.

    Its class is that of the Auto class *auto*, or else the architecture that the config names, or else the one that the
    config is for, first of all for causal models. Parameters are of *dtype*, or else of the config's, or float32.
    Errors as for ``read_config``; ValueError too where it is of no language model, and where transformers makes none.
    """
    config = copy.deepcopy(source) if isinstance(source, PreTrainedConfig) else read_config(source)
    names = getattr(config, "architectures", None) or [""]
    kind = getattr(transformers, names[0], None)
    stored: Any = dtype or config.dtype or torch.float32
    known = [partial(auto.from_config, dtype=stored) for mapping, auto in _AUTO if type(config) in mapping]
    makers = [partial(auto.from_config, dtype=stored)] if auto else [kind] if kind else known
    if not makers:
        raise ValueError(
            f"{type(config).__name__} names no architecture and is of no language model; known are the models of "
            f"{', '.join(auto.__name__ for _, auto in _AUTO)}"
        )
    with making_a_model(config), local_torch_dtype(stored), no_init_weights(), torch.device("meta"):
        model: Any = makers[0](config)
    model.tie_weights()
    return model


def read_config(name: str | os.PathLike[str], **options: Any) -> Any:
    """Return the config in a folder, in a file, or under a name on the hub, with the *options* of a model's loader.

    Raises ValueError when there is none, with the nearest name beside a path that does not exist.
    """
    try:
        return AutoConfig.from_pretrained(os.fspath(name), **options)
    except Exception as error:  # every class checks its fields in its own way
        raise ValueError(
            f"no model config at {shown(os.fspath(name))}{near_file(name)}; name a folder with a config.json, "
            f"such a file, or a model of the hub ({in_one_line(error)})"
        ) from error


@contextmanager
def making_a_model(config: Any) -> Iterator[None]:
    """Within the context, an error of transformers about the values of *config* is a ValueError that says so."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"transformers makes no model of this {type(config).__name__}: {in_one_line(error)}"
        ) from error


def in_one_line(error: Exception) -> str:
    """Return the text of an *error* of another package, and its type where that says more, in one line."""
    text = " ".join(str(error).split())
    told = text if isinstance(error, ValueError | OSError) and text else f"{type(error).__name__}: {text}"
    return told if len(told) <= _LONGEST else f"{told[:_LONGEST]}..."
