"""Write the files next to the weights in a Hugging Face folder: configs, and the files of tokenizer and processor."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import nn
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from nemo_dist.checkpoint.hf_weight_conversion import plain_config
from nemo_dist.errors import CheckpointError
from nemo_dist.hf_model import plain_class

_ORIGIN = "_nemo_dist_origin"  # the attribute of a model with the folders that may have its tokenizer
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

    A model with code of its own gets that code too. ``dtype`` goes into the config; None is that of the model. Values
    that transformers refuses to save cause a warning; see ``refuse_invalid``.
    """
    config = plain_config(model, dtype)
    folder.mkdir(exist_ok=True)
    if model.is_remote_code():
        custom_object_save(_bare(model), folder, config=config)  # which goes into the config
    for kind, name in _configs(model, config):
        try:
            kind.save_pretrained(folder)
        except OSError:  # of the disk, not of the values
            raise
        except Exception as error:  # also huggingface_hub has some of its own
            warnings.warn(f"{name} has values that transformers does not save: {error}", stacklevel=2)
            kind.to_json_file(folder / name)
    for found in _companions(model):
        shutil.copyfile(found, folder / found.name)


def refuse_invalid(model: Any) -> None:
    """Raise CheckpointError for configs of *model* that transformers refuses to save, so that no one loads them."""
    with tempfile.TemporaryDirectory() as folder:
        for kind, name in _configs(model, plain_config(model, None)):
            try:
                kind.save_pretrained(folder)
            except OSError:  # of the disk, not of the values
                raise
            except Exception as error:
                own = "config" if name == CONFIG_NAME else "generation_config"
                raise CheckpointError(f"transformers does not save {name}: {error}\nChange model.{own}") from error


def _configs(model: Any, config: Any) -> list[tuple[Any, str]]:
    generation = [(model.generation_config, GENERATION_CONFIG_NAME)] if model.can_generate() else []
    return [(config, CONFIG_NAME), *generation]


def _bare(model: Any) -> nn.Module:
    """Return an empty module of the class of *model* without sharding, whose name and file are those of the code."""
    kind: Any = plain_class(model)
    bare: nn.Module = kind.__new__(kind)
    nn.Module.__init__(bare)
    return bare


def remember_origin(model: Any, cache_dir: str | None = None, revision: str | None = None, subfolder: str = "") -> None:
    """Note the folder that *model* was loaded from by these keywords of ``from_pretrained``, absolute.

    The working folder may change later, and in the cache of the hub the newest revision.
    """
    name = model.config.name_or_path or ""
    if os.path.isdir(name):
        model.config.name_or_path = name = os.path.abspath(name)
    folder = _folder(name, cache_dir, revision, subfolder)
    above = len(Path(subfolder).parts)
    vars(model)[_ORIGIN] = [folder, *folder.parents[:above]] if folder else []


def _folder(name: str, cache_dir: str | None = None, revision: str | None = None, subfolder: str = "") -> Path | None:
    """Return the local folder called *name*, or the one in the cache of the hub with the config of the model *name*."""
    if not name or os.path.exists(name):
        return Path(name, subfolder) if name else None
    config = str(Path(subfolder, CONFIG_NAME))
    try:
        cached = try_to_load_from_cache(name, config, cache_dir=cache_dir, revision=revision)
    except HFValidationError:  # a path that no longer exists, which is no valid hub name
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def _companions(model: Any) -> list[Path]:
    """Return the files of tokenizer and processor from the first folder of the model's origin that has any."""
    folders = vars(model).get(_ORIGIN) or filter(None, [_folder(model.config.name_or_path or "")])
    found = ([path for name in _COMPANIONS if (path := folder / name).is_file()] for folder in folders)
    return next(filter(None, found), [])
