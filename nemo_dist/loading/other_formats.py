"""Recognise checkpoints of other programs by their files, and say how to get what is in them; none is unpickled."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import attrs

_ALONE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_WHOLE = ("model*.safetensors", "pytorch_model*.bin", "adapter_model.safetensors")


@attrs.frozen(kw_only=True)
class Format:
    """A format: what it is called, patterns of file names of which one suffices, and the way in."""

    name: str
    signs: tuple[str, ...]
    way: str


_FORMATS = (
    Format(
        name="the folder of a run",
        signs=("step-*/manifest.json",),
        way="pass one of the checkpoints in it, or call nemo_dist.RunFolder(folder).resume(runtime, ...)",
    ),
    Format(
        name="a distributed checkpoint of transformers",
        signs=("shard-*-model-*-of-*.safetensors", "model/shard-*-model-*-of-*.safetensors"),
        way="make a model folder of it with transformers.distributed.consolidate_distributed_checkpoint(folder, out), "
        "in one process, copy the model's config.json and tokenizer to out, and load that with from_pretrained",
    ),
    Format(
        name="a checkpoint of torch.distributed.checkpoint (DCP)",
        signs=(".metadata", "*/.metadata"),  # first: a Trainer or accelerate that shards keeps these in its folder
        way="torch.distributed.checkpoint.format_utils.dcp_to_torch_save(folder, file), with the folder that has "
        ".metadata, in one process makes a file of it (it unpickles: trust who wrote it); give the model's part of it "
        "to load_state_dict of a plain transformers model, call save_pretrained, and load that with from_pretrained. "
        "To keep the optimizer, load the folder with get_state_dict, dcp.load and set_state_dict into runtime.model "
        "and runtime.optimizer(...), and call runtime.save",
    ),
    Format(
        name="a checkpoint of accelerate",
        signs=("random_states_*.pkl",),
        way="where it has model.safetensors, put the model's config.json beside it and load the folder with "
        "from_pretrained; the state of the optimizer, where it is one file, loads with "
        "optimizer.load_state_dict(torch.load(file, weights_only=True))",
    ),
    Format(
        name="a checkpoint of transformers' Trainer",
        signs=("trainer_state.json",),
        way="load the weights with from_pretrained(folder); optimizer.load_state_dict(torch.load(folder/optimizer.pt, "
        "weights_only=True)) takes the state of the optimizer, given the same groups of parameters",
    ),
    Format(
        name="the folder of a model",
        signs=_WHOLE,
        way="load its weights with from_pretrained(folder)",
    ),
)


def recognised(folder: str | os.PathLike[str]) -> Format | None:
    """Return the format of the checkpoint in *folder*, if it is one of those known here."""
    where = Path(folder)
    return next((form for form in _FORMATS if any(next(where.glob(sign), None) for sign in form.signs)), None)


def way_in(folder: str | os.PathLike[str]) -> str | None:
    """Return a sentence on what *folder* is and how to load it; None for one that is not known."""
    form = recognised(folder)
    return None if form is None else f"{os.fspath(folder)} is {form.name}, not what runtime.save writes; {form.way}"


def unloadable(folder: object) -> str | None:
    """Return a sentence for the *folder* of a checkpoint without whole model files, which ``from_pretrained`` needs."""
    if not isinstance(folder, str | os.PathLike) or not Path(folder).is_dir():
        return None
    form = recognised(folder)
    if form is None or any(next(Path(folder).glob(sign), None) for sign in _WHOLE):
        return None
    return f"{os.fspath(folder)} is {form.name}, which from_pretrained does not read; {form.way}"


def damaged_index(folder: object) -> str | None:
    """Return a sentence for the *folder* of a model whose index of weight files is not what transformers reads."""
    path = Path(folder, _INDEX) if isinstance(folder, str | os.PathLike) else None
    if path is None or not path.is_file() or path.with_name(_ALONE).is_file():
        return None
    try:
        index = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        return f"{path} is damaged: {error}"
    known = isinstance(index, Mapping) and isinstance(index.get("metadata"), Mapping)
    files = index.get("weight_map") if known else None
    if isinstance(files, Mapping) and all(isinstance(file, str) and file for file in files.values()):
        return None
    return (
        f"{path} is damaged: it must have a mapping 'metadata', and a mapping 'weight_map' from the names of weights "
        "to those of files; copy it anew, or write the model with save_pretrained"
    )
