"""Write the files next to the weights in a Hugging Face folder: configs, and the files of tokenizer and processor."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers.dynamic_module_utils import custom_object_save

from nemo_dist.checkpoint.hf_weight_conversion import plain_config

_COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)


def write_companions(folder: Path, model: Any, dtype: torch.dtype | None = None) -> None:
    """Write the config and generation config, and copy tokenizer and processor files from where the model was loaded.

    A model with code of its own gets that code too. ``dtype`` goes into the config; None is that of the model.
    """
    plain_config(model, dtype).save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    if model.is_remote_code():
        custom_object_save(model, folder, config=model.config)
    for name in _COMPANIONS:
        origin = _companion(model.config, name)
        if origin is not None:
            shutil.copyfile(origin, folder / name)


def remember_origin(model: Any) -> None:
    """Keep the folder that *model* was loaded from as an absolute path, as the working folder may change later."""
    if os.path.isdir(model.config.name_or_path or ""):
        model.config.name_or_path = os.path.abspath(model.config.name_or_path)


def _companion(config: Any, name: str) -> Path | None:
    """Return the file *name* from the model's origin, a local folder or the cache of a hub name, or None."""
    origin = config.name_or_path or ""
    local = Path(origin) / name
    if origin and local.is_file():
        return local
    if not origin or Path(origin).exists():
        return None
    try:
        cached = try_to_load_from_cache(origin, name, revision=getattr(config, "_commit_hash", None))
    except HFValidationError:  # the origin is a path that no longer exists, which is no valid hub name
        return None
    return Path(cached) if isinstance(cached, str) else None
