"""Write a model as a plain Hugging Face folder, in parallel on all ranks; no rank holds the whole model."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from nemo_dist.checkpoint.atomic_dir import write_folder
from nemo_dist.checkpoint.chunks import assemble, survey
from nemo_dist.checkpoint.hf_side_files import refuse_invalid, write_companions
from nemo_dist.checkpoint.hf_weight_conversion import (
    Group,
    ShapeAndDtype,
    groups,
    nbytes,
    refuse_unplain,
    refuse_wrapped,
    skeleton,
)
from nemo_dist.checkpoint.holdings import Entry
from nemo_dist.checkpoint.safetensors_writer import DTYPE_OF, DTYPES, SafetensorsFile
from nemo_dist.checkpoint.sharded_model import ShardedModel
from nemo_dist.checkpoint.state_dict import model_state
from nemo_dist.errors import CheckpointError
from nemo_dist.mesh.rank_group import RankGroup
from nemo_dist.planning.validation import shown

Assemble = Callable[[Sequence[Sequence[str]]], dict[str, Tensor]]  # names per rank -> this rank's whole tensors

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# What from_pretrained would read in place of what is written. Other files, also those of a variant, are the user's.
_WEIGHTS = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    r"|pytorch_model(-\d{5}-of-\d{5})?\.bin|pytorch_model\.bin\.index\.json"
)
_ADAPTERS = "adapter_config.json"


@attrs.define
class Bundle:
    """Groups of parameters that one rank writes, and the layout of their file, or files for one huge group."""

    groups: list[Group]
    files: list[dict[str, ShapeAndDtype]]


def export(
    sharded: ShardedModel,
    path: str | os.PathLike[str],
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write the model to the folder *path*; see :meth:`nemo_dist.Runtime.export`."""
    ranks, model = sharded.ranks, sharded.model

    def collected() -> Mapping[str, Tensor]:
        dtype_of(dtype), bytes_of(max_shard_size)
        refuse_unplain(model)
        refuse_wrapped(sharded.parts)
        return model_state(sharded)

    state, entries = survey(ranks, "collecting what to export", collected)
    with ranks.agreed("planning the export"):
        if ranks.first:  # which writes them
            refuse_invalid(model)
        plan = Plan.of(skeleton(model), entries, dtype_of(dtype), bytes_of(max_shard_size))
    plan.write(ranks, path, model, lambda wanted: assemble(ranks, wanted, state, entries, plan.dtypes))


@attrs.frozen(kw_only=True)
class Plan:
    """The plan of an export: bundles of the parameters of ``bare``, the model on meta, and their saved dtypes."""

    bare: Any
    bundles: list[Bundle]
    dtypes: Mapping[str, torch.dtype]

    @classmethod
    def of(cls, bare: Any, entries: Mapping[str, Entry], target: torch.dtype | None, limit: int) -> Plan:
        """Return the plan for *entries*, cast to *target* and cut at *limit* bytes per file; equal on every rank."""
        skipped = bare._keys_to_ignore_on_save or ()
        dtypes = {
            name: target if target and DTYPE_OF[entry.dtype].is_floating_point else DTYPE_OF[entry.dtype]
            for name, entry in sorted(entries.items())
            if name not in skipped
        }
        found = groups(bare, {name: (entries[name].shape, kind) for name, kind in dtypes.items()})
        return cls(bare=bare, bundles=pack(found, limit), dtypes=dtypes)

    def write(self, ranks: RankGroup, path: str | os.PathLike[str], model: Any, assemble: Assemble) -> None:
        """Write the folder at *path*, of tensors that *assemble* returns; collective over *ranks*."""
        names = file_names(self.bundles)

        def write(folder: Path) -> None:
            with _Writer(ranks, folder, self.bare, names) as writer:
                writer.write(self.bundles, assemble)

        def finish(folder: Path, _: list[Any]) -> None:
            _write_index(folder, self.bundles, names)
            write_companions(folder, model, self._dtype())

        write_folder(ranks, path, "the export", write=write, finish=finish, stale=_is_weights, refuse=_refuse_adapters)

    def _dtype(self) -> torch.dtype | None:
        """Return the dtype that the model will have for transformers: that of its first floating-point parameter."""
        known = (self.dtypes.get(name) for name, _ in self.bare.named_parameters())
        return next((dtype for dtype in known if dtype and dtype.is_floating_point), None)


def pack(found: Sequence[Group], limit: int) -> list[Bundle]:
    """Pack the groups into files of at most *limit* bytes, in order; only a single larger tensor exceeds it."""
    bundles: list[Bundle] = []
    room = 0
    for group in found:
        if group.nbytes > limit:
            bundles.append(Bundle([group], _split(group.saved, limit)))
            room = 0
            continue
        if group.nbytes > room:
            bundles.append(Bundle([], [{}]))
            room = limit
        bundles[-1].groups.append(group)
        bundles[-1].files[0].update(group.saved)
        room -= group.nbytes
    return bundles


def _split(saved: Mapping[str, ShapeAndDtype], limit: int) -> list[dict[str, ShapeAndDtype]]:
    files: list[dict[str, ShapeAndDtype]] = [{}]
    room = limit
    for name, layout in saved.items():
        size = nbytes(layout)
        if size > room and files[-1]:
            files.append({})
            room = limit
        files[-1][name] = layout
        room -= size
    return files


def file_names(bundles: Sequence[Bundle]) -> list[list[str]]:
    """Return the file names of each bundle, numbered as by ``save_pretrained``."""
    total = sum(len(bundle.files) for bundle in bundles)
    if total == 1:
        return [["model.safetensors"]]
    numbers = iter(range(1, total + 1))
    return [[f"model-{next(numbers):05d}-of-{total:05d}.safetensors" for _ in bundle.files] for bundle in bundles]


class _Writer:
    """Writes this rank's files: ranks take bundles in turn, and write one group of parameters at a time."""

    def __init__(self, ranks: RankGroup, folder: Path, bare: Any, names: list[list[str]]) -> None:
        self._ranks, self._folder, self._bare, self._names = ranks, folder, bare, names
        self._open: dict[str, SafetensorsFile] = {}  # the open file of each tensor name
        self._stack = ExitStack()
        self._failure: Exception | None = None

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    def write(self, bundles: list[Bundle], assemble: Assemble) -> None:
        """Write this rank's bundles; every rank takes part in every all-to-all, even after its own disk has failed."""
        world = self._ranks.size
        steps = [_steps(range(owner, len(bundles), world), bundles) for owner in range(world)]
        for turn in range(max(map(len, steps))):
            wanted = [mine[turn][1].sources if turn < len(mine) else () for mine in steps]
            whole = assemble(wanted)
            mine = steps[self._ranks.rank]
            if turn < len(mine) and self._failure is None:
                self._try(bundles, *mine[turn], whole)
        if self._failure is not None:
            raise self._failure

    def _try(self, bundles: list[Bundle], index: int, group: Group, whole: dict[str, Tensor]) -> None:
        bundle = bundles[index]
        try:
            if group is bundle.groups[0]:
                self._begin(bundle, self._names[index])
            for name, tensor in group.convert(self._bare, whole).items():
                self._open[name].write(name, tensor)
            if group is bundle.groups[-1]:
                self._stack.close()
        except Exception as error:
            self._failure = error
            self._stack.pop_all()

    def _begin(self, bundle: Bundle, names: list[str]) -> None:
        for name, layouts in zip(names, bundle.files, strict=True):
            file = self._stack.enter_context(SafetensorsFile(self._folder / name, layouts))
            self._open |= dict.fromkeys(layouts, file)


def _steps(owned: Iterable[int], bundles: list[Bundle]) -> list[tuple[int, Group]]:
    return [(index, group) for index in owned for group in bundles[index].groups]


def _write_index(folder: Path, bundles: list[Bundle], names: list[list[str]]) -> None:
    files = [
        (name, file)
        for bundle, own in zip(bundles, names, strict=True)
        for name, file in zip(own, bundle.files, strict=True)
    ]
    if len(files) == 1:
        return
    layouts = [layout for _, file in files for layout in file.values()]
    index = {
        "metadata": {
            "total_parameters": sum(torch.Size(shape).numel() for shape, _ in layouts),
            "total_size": sum(map(nbytes, layouts)),
        },
        "weight_map": dict(sorted((saved, name) for name, file in files for saved in file)),
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _is_weights(name: str) -> bool:
    return _WEIGHTS.fullmatch(name) is not None


def _refuse_adapters(folder: Path) -> None:
    """Raise CheckpointError for a *folder* with adapters, which transformers adds to the weights beside them."""
    if (folder / _ADAPTERS).exists():
        raise CheckpointError(
            f"{folder} has adapters of PEFT ({_ADAPTERS}), which from_pretrained would add to the exported weights; "
            "export to another folder, or move the adapters away"
        )


def dtype_of(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return the floating-point *dtype*, given as such or by name; None for None; raise ValueError for another."""
    given = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if given is None and dtype is None:
        return None
    if not isinstance(given, torch.dtype) or not given.is_floating_point or given not in DTYPES:
        raise ValueError(f"dtype must be a floating-point dtype such as 'bfloat16' (got {shown(dtype)})")
    return given


def bytes_of(size: int | str) -> int:
    """Return *size* in bytes, given as an int or as text like ``"5GB"``; raise ValueError for anything else."""
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    text = size.strip().upper() if isinstance(size, str) else ""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+) ?([KMG]I?B)", text)
    amount = 0.0 if found is None else float(found[1]) * _UNITS[found[2]]
    if not 1 <= amount < math.inf:
        raise ValueError(f"max_shard_size must be a positive number of bytes or text like '5GB' (got {shown(size)})")
    return int(amount)
