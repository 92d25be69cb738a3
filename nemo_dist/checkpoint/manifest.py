"""The manifest of a checkpoint: its tensors, where their chunks are, everything that is not a tensor, and checksums."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import attrs
from safetensors import SafetensorError, safe_open

from nemo_dist.checkpoint.chunks import Chunk
from nemo_dist.checkpoint.safetensors_writer import DTYPES
from nemo_dist.errors import CheckpointError
from nemo_dist.loading.other_formats import way_in
from nemo_dist.plugin.mixed_precision import dtype_name

FORMAT = 1
NAME = "manifest.json"
IDENTITY = "hf"  # the folder with config and tokenizer, which an offline export needs
_FILE = re.compile(r"rank-[0-9]{5}\.safetensors")
_BUFFER = 1 << 24
_DTYPES = {dtype_name(dtype): dtype for dtype in DTYPES}


def is_entry(name: str) -> bool:
    """Whether an entry called *name* in the folder of a checkpoint is part of the checkpoint."""
    return name in (NAME, IDENTITY) or bool(_FILE.fullmatch(name))


def refuse_others(folder: Path) -> None:
    """Raise CheckpointError for a *folder* that is neither empty nor a checkpoint, complete or damaged."""
    found = sorted(entry.name for entry in folder.iterdir())
    damaged = all(map(is_entry, found)) and any(map(_FILE.fullmatch, found))
    if found and not damaged and not _has_manifest(folder):
        some = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        raise CheckpointError(
            f"{folder} is not a checkpoint, and a save would replace what it has ({some}); name a new folder in it, or "
            "save with RunFolder"
        )


def _has_manifest(folder: Path) -> bool:
    try:
        return {"format", "checksum", "tensors"} <= _parse(folder).keys()
    except CheckpointError:
        return False


@attrs.frozen
class StoredChunk:
    """A chunk of a tensor, and the index in the manifest of the file that contains it."""

    chunk: Chunk
    file: int


@attrs.frozen
class Stored:
    """A tensor of the checkpoint: its shape, its dtype, and its chunks."""

    shape: tuple[int, ...]
    dtype: Any
    pieces: Sequence[StoredChunk]


def key(name: str, chunk: Chunk) -> str:
    """Return the name under which a chunk of the tensor *name* is stored: ``model/lm_head.weight[0:48,0:32]``."""
    spans = (f"{start}:{start + size}" for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
    return f"{name}[{','.join(spans)}]"


@attrs.frozen(kw_only=True)
class Manifest:
    """The manifest of the checkpoint in ``folder``; ``about`` is everything that is not a tensor.

    ``files`` are those of the ranks, ``companions`` those in the folder ``hf``, each with name, bytes and crc32.
    """

    folder: Path
    files: Sequence[Mapping[str, Any]]
    companions: Sequence[Mapping[str, Any]]
    tensors: Mapping[str, Stored]
    about: Mapping[str, Any]

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Manifest:
        """Read and validate the manifest in *folder*, and the sizes of the files that it names.

        Raises CheckpointError for a manifest that is missing, damaged or of a newer format, and for files that are
        missing or have another size. The content of the files is not read; see ``verify``.
        """
        where = Path(folder)
        content = _parse(where)
        if not isinstance(content.get("format"), int) or content["format"] > FORMAT:
            raise CheckpointError(
                f"{where} has checkpoint format {content.get('format')!r}, and this version reads up to {FORMAT}; "
                "update nemo_dist"
            )
        with _readable(where / NAME):
            checksum, found = content.pop("checksum", None), _checksum(content)
            if checksum != found:
                raise CheckpointError(f"{where / NAME} is damaged: its checksum is {checksum!r}, not {found}")
            tensors = {name: _stored(value) for name, value in content["tensors"].items()}
            companions = content.get("companions", [])  # version 0.1 listed none
            manifest = cls(folder=where, files=content["files"], companions=companions, tensors=tensors, about=content)
            manifest._check()
            manifest._check_about()
        return manifest

    def readable(self) -> AbstractContextManager[None]:
        """Within the context, an error in the values of the manifest is a CheckpointError."""
        return _readable(self.folder / NAME)

    def _check(self) -> None:
        for file in self.files:
            name, size = str(file["name"]), int(file["bytes"])
            if not _FILE.fullmatch(name):
                raise CheckpointError(f"{self.folder / NAME} names the file {name!r}, which is not one of a checkpoint")
            self._check_file(self.folder / name, size)
        for file in self.companions:
            self._check_file(self.folder / IDENTITY / file["name"], int(file["bytes"]))
        for name, stored in self.tensors.items():
            whole = Chunk((0,) * len(stored.shape), stored.shape)
            for piece in stored.pieces:
                if not 0 <= piece.file < len(self.files) or piece.chunk.common(whole) != piece.chunk:
                    raise ValueError(f"a piece of {name} lies outside the tensor or the files")
            if sum(piece.chunk.numel for piece in stored.pieces) != whole.numel or overlap(stored.pieces):
                raise ValueError(f"the pieces of {name} do not make the whole tensor")

    def _check_about(self) -> None:
        """Raise ValueError or KeyError where ``about`` or the entry of a file lacks a value, or has a wrong type."""
        about = self.about
        _require(about.get("step"), int | None, "step")
        plugins = _require(about.get("plugin_states", {}), dict, "plugin_states")
        _require(about["model"], str, "model")
        _require(about["optimizer"], str | None, "optimizer")
        _require(about["extra"], object, "extra")
        _require(about["schedulers"], list, "schedulers")
        for name, value in about["topology"].items():
            _require(value, int | str, name)
        for file in (*self.files, *self.companions):
            _require(file["crc32"], int, "a checksum")
            for name in _require(file.get("not_finite", []), list, "not_finite"):
                _require(name, str, "not_finite")
        for rank in _require(about["ranks"], list, "ranks"):
            _require(rank["dp_rank"], int, "dp_rank")
            _require(rank["generators"], dict, "generators")
            _require(rank["data"], object, "data")
            if _require(rank.get("plugin_states", {}), dict, "plugin_states").keys() != plugins.keys():
                raise ValueError("its ranks have states of other plugins than it lists")
        if not about["ranks"]:
            raise ValueError("it lists no ranks")
        if about["optimizer"] is not None:
            for what in ("counts", "options"):
                for value, names in _require(about[what], list, what):
                    _require(value, dict, what)
                    for name in _require(names, list, what):
                        _require(name, str, what)
            if not about["counts"] and self.kinds("optimizer."):
                raise ValueError("it has moments of the optimizer, but no step counts")

    def _check_file(self, path: Path, size: int) -> None:
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise CheckpointError(f"{path} leads out of the checkpoint; copy the file into it")
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; the checkpoint is not complete")
        if path.stat().st_size != size:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, not {size}; it was cut or replaced")

    @property
    def not_finite(self) -> list[str]:
        """Some of the chunks of weights that were not finite when saved, by their names in the files."""
        return [piece for file in self.files for piece in file.get("not_finite", [])]

    def kinds(self, prefix: str) -> list[str]:
        """Return the sorted kinds of tensors under *prefix*: ``exp_avg`` for ``optimizer.exp_avg/lm_head.weight``."""
        return sorted({name[len(prefix) :].partition("/")[0] for name in self.tensors if name.startswith(prefix)})

    def verify(self, index: int) -> None:
        """Read file *index* whole; raise CheckpointError unless its checksum, shapes and dtypes are those saved."""
        path = self.folder / self.files[index]["name"]
        _verify(path, self.files[index])
        try:
            with safe_open(path, framework="pt") as stored:
                self._compare(path, index, stored)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is no safetensors file, or lacks a tensor: {error}") from error

    def verify_companions(self) -> None:
        """Raise CheckpointError unless the checksums of the files in ``hf`` are those saved."""
        for file in self.companions:
            _verify(self.folder / IDENTITY / file["name"], file)

    def _compare(self, path: Path, index: int, stored: Any) -> None:
        """Raise CheckpointError when a chunk in the file has another shape or dtype than the manifest says.

        A checksum alone does not protect against a file that was made to match it.
        """
        for name, tensor in self.tensors.items():
            for piece in tensor.pieces:
                if piece.file == index:
                    found = stored.get_slice(key(name, piece.chunk))
                    if (tuple(found.get_shape()), found.get_dtype()) != (piece.chunk.sizes, DTYPES[tensor.dtype]):
                        raise CheckpointError(f"{path} has {name} as {found.get_dtype()} {found.get_shape()}")


def _verify(path: Path, file: Mapping[str, Any]) -> None:
    found = _crc32(path)
    if found != file["crc32"]:
        raise CheckpointError(f"{path} is damaged: its checksum is {found}, not {file['crc32']}")


def _crc32(path: Path) -> int:
    found = 0
    with path.open("rb", buffering=0) as stream:
        buffer = memoryview(bytearray(min(_BUFFER, max(1, path.stat().st_size))))
        while count := stream.readinto(buffer):
            found = zlib.crc32(buffer[:count], found)
    return found


def overlap(pieces: Sequence[StoredChunk]) -> bool:
    """Whether two of *pieces* of one tensor have an element in common.

    A sweep along the first dim, in which most tensors are cut: only pieces with common rows are compared.
    """
    if not pieces or not pieces[0].chunk.sizes:
        return len(pieces) > 1
    open_chunks: list[Chunk] = []
    for piece in sorted(pieces, key=lambda piece: piece.chunk.offsets[0]):
        start = piece.chunk.offsets[0]
        open_chunks = [chunk for chunk in open_chunks if chunk.offsets[0] + chunk.sizes[0] > start]
        if any(chunk.common(piece.chunk) is not None for chunk in open_chunks):
            return True
        open_chunks.append(piece.chunk)
    return False


def _require(value: Any, kind: Any, what: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{what} is a {type(value).__name__}")
    return value


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # whatever decoders raise for junk
        raise CheckpointError(f"{path} is malformed: {type(error).__name__}: {error}") from error


def _parse(where: Path) -> dict[str, Any]:
    if not where.is_dir():
        raise CheckpointError(f"there is no checkpoint at {where}")
    path = where / NAME
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        other = way_in(where) or f"{where} is no checkpoint, or not a complete one"
        raise CheckpointError(f"{path} is missing; {other}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is malformed: it must be a JSON object (got {type(content).__name__})")
    return content


def _stored(value: Any) -> Stored:
    shape, dtype, listed = value
    pieces = [
        StoredChunk(Chunk(tuple(map(int, offsets)), tuple(map(int, sizes))), int(file))
        for file, offsets, sizes in listed
    ]
    return Stored(tuple(map(int, shape)), _DTYPES[dtype], pieces)


def write(
    folder: Path, files: Sequence[Mapping[str, Any]], tensors: Mapping[str, Stored], about: Mapping[str, Any]
) -> None:
    """Write the manifest of *files* and of those in ``hf`` into *folder*, and flush it to the disk."""
    identity = folder / IDENTITY
    companions = [
        {"name": path.relative_to(identity).as_posix(), "bytes": path.stat().st_size, "crc32": _crc32(path)}
        for path in sorted(identity.rglob("*"))
        if path.is_file()
    ]
    listed = {
        name: [
            stored.shape,
            dtype_name(stored.dtype),
            [[piece.file, piece.chunk.offsets, piece.chunk.sizes] for piece in stored.pieces],
        ]
        for name, stored in tensors.items()
    }
    content = json.loads(
        json.dumps({**about, "format": FORMAT, "files": files, "companions": companions, "tensors": listed})
    )
    with (folder / NAME).open("w") as stream:
        json.dump({**content, "checksum": _checksum(content)}, stream)
        stream.flush()
        os.fsync(stream.fileno())


def _checksum(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())
