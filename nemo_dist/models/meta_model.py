"""Make a model of a config on the meta device: every module and shape, and no weight."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from nemo_dist.planning.validation import near, shown

_LONGEST = 300  # characters of an error of transformers


def meta_model(source: str | os.PathLike[str]) -> Any:
    """Return the model that *source* describes: a folder, a config file, or a name on the hub; no weight is read.

    Its class is the architecture that the config names, or else the one for causal models; its dtype is the config's.
    Errors as for ``read_config``.
    """
    config = read_config(source)
    names = getattr(config, "architectures", None) or [""]
    kind = getattr(transformers, names[0], None)
    with making_a_model(config), torch.device("meta"):
        model: Any = kind(config) if kind else AutoModelForCausalLM.from_config(config)
    return model.to(config.dtype) if config.dtype else model


def read_config(name: str | os.PathLike[str]) -> Any:
    """Return the config in a folder, in a file, or under a name on the hub.

    Raises ValueError when there is none, with the nearest name beside a path that does not exist.
    """
    try:
        return AutoConfig.from_pretrained(os.fspath(name))
    except Exception as error:  # every class checks its fields in its own way
        raise ValueError(
            f"no model config at {shown(os.fspath(name))}{_beside(os.fspath(name))}; name a folder with a config.json, "
            f"such a file, or a model of the hub ({in_one_line(error)})"
        ) from error


def _beside(name: str) -> str:
    try:
        path = Path(name)
        return near(path.name, [entry.name for entry in path.parent.iterdir()]) if not path.exists() else ""
    except (OSError, ValueError):  # there is no such folder, or no such path
        return ""


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
