"""Export a checkpoint as a Hugging Face folder in one process, without the ranks that wrote it."""

from __future__ import annotations

import os
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from nemo_dist.checkpoint.atomic_dir import folder_at
from nemo_dist.checkpoint.hf_export import Plan, bytes_of, dtype_of
from nemo_dist.checkpoint.hf_side_files import refuse_invalid
from nemo_dist.checkpoint.holdings import Entry
from nemo_dist.checkpoint.layout import whole_of
from nemo_dist.checkpoint.load import Reader, intact
from nemo_dist.checkpoint.manifest import IDENTITY, NAME, Manifest
from nemo_dist.checkpoint.run_folder import RunFolder
from nemo_dist.checkpoint.safetensors_writer import DTYPE_OF
from nemo_dist.checkpoint.save import MODEL
from nemo_dist.checkpoint.state_dict import canonical_names
from nemo_dist.errors import CheckpointError
from nemo_dist.mesh.rank_group import RankGroup


def export_checkpoint(
    checkpoint: str | os.PathLike[str],
    path: str | os.PathLike[str],
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Export *checkpoint* to the folder *path* as plain Hugging Face files; return the folder of the checkpoint used.

    *checkpoint* is what ``Runtime.save`` wrote, or a ``RunFolder``, of which the newest undamaged checkpoint is used.
    Needs one process and memory for the parameters that are converted together, mostly one tensor. ``dtype`` and
    ``max_shard_size`` are those of ``Runtime.export``. Raises CheckpointError for a checkpoint that is damaged, or
    whose model class transformers does not have or names its weights otherwise, as with PEFT's adapters.
    """
    target, limit = dtype_of(dtype), bytes_of(max_shard_size)
    ranks = RankGroup()
    manifest = _checkpoint(ranks, folder_at(checkpoint))
    with ranks.agreed(f"reading the configs in {manifest.folder / IDENTITY}"):
        model = _identity(manifest)
    stored = {n.removeprefix(MODEL): tensor for n, tensor in manifest.tensors.items() if n.startswith(MODEL)}
    _refuse_others(manifest, model, stored.keys())
    refuse_invalid(model)
    entries = {name: Entry(tensor.shape, tensor.dtype) for name, tensor in stored.items()}
    plan = Plan.of(model, entries, target, limit)
    with Reader(manifest) as reader:

        def assemble(wanted: Sequence[Sequence[str]]) -> dict[str, Tensor]:
            return {name: _whole(reader, name, entries[name]).to(plan.dtypes[name]) for name in wanted[0]}

        plan.write(ranks, path, model, assemble)
    return manifest.folder


def _checkpoint(ranks: RankGroup, given: Path) -> Manifest:
    with ranks.agreed("looking for the checkpoint"):  # an error of the system has the path
        alone = (given / NAME).exists()
    if alone:
        return intact(ranks, given)
    newest = RunFolder(given).newest_intact(ranks)
    if newest is None:
        raise CheckpointError(f"there is no checkpoint at {given}; pass what runtime.save or a RunFolder wrote")
    return newest[1]


def _refuse_others(manifest: Manifest, model: Any, stored: Set[str]) -> None:
    """Raise CheckpointError where the names of the weights in the checkpoint are not those of the model's class."""
    state = model.state_dict(keep_vars=True)
    odd = sorted((stored - state.keys()) | (set(canonical_names(model, state).values()) - stored))
    if odd:
        raise CheckpointError(
            f"{manifest.folder} has not the weights of a plain {type(model).__name__} ({odd[0]} and {len(odd) - 1} "
            "more are in one of them only), as when it was saved with adapters; load it into the model that it was "
            "saved from, and call runtime.export(...) there"
        )


def _identity(manifest: Manifest) -> Any:
    """Return the model of the checkpoint on the meta device, built from its config by transformers' own class."""
    folder, name = manifest.folder / IDENTITY, manifest.about["model"]
    kind: Any = getattr(transformers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise CheckpointError(
            f"{manifest.folder} is of a {name}, which transformers {transformers.__version__} does not have; call "
            "runtime.export(...) where the model is"
        )
    try:
        config = kind.config_class.from_pretrained(folder)  # type: ignore[union-attr]  # every model class has one
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} has no config that can be read: {error}") from error
    with torch.device("meta"):
        model = kind(config)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model


def _whole(reader: Reader, name: str, entry: Entry) -> Tensor:
    whole = torch.empty(entry.shape, dtype=DTYPE_OF[entry.dtype])
    if whole.numel():
        reader.read(MODEL + name, whole_of(entry.shape), whole)
    return whole
