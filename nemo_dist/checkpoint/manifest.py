"""The manifest of a checkpoint: its tensors, where their chunks are, everything that is not a tensor, and checksums."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from safetensors import SafetensorError, safe_open

from nemo_dist.checkpoint.chunks import Chunk
from nemo_dist.checkpoint.safetensors_writer import DTYPES
from nemo_dist.errors import CheckpointError
from nemo_dist.plugin.mixed_precision import dtype_name

FORMAT = 1
NAME = "manifest.json"
_FILE = re.compile(r"rank-[0-9]{5}\.safetensors")
_CHUNK = 1 << 24
_DTYPES = {dtype_name(dtype): dtype for dtype in DTYPES}


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
    """The manifest of the checkpoint in ``folder``; ``about`` is everything that is not a tensor."""

    folder: Path
    files: Sequence[Mapping[str, Any]]
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
        checksum = content.pop("checksum", None)
        if checksum != _checksum(content):
            raise CheckpointError(f"{where / NAME} is damaged: its checksum is {checksum!r}, not {_checksum(content)}")
        try:
            tensors = {name: _stored(value) for name, value in content["tensors"].items()}
            manifest = cls(folder=where, files=content["files"], tensors=tensors, about=content)
            manifest._check()
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise CheckpointError(f"{where / NAME} is malformed: {type(error).__name__}: {error}") from error
        return manifest

    def _check(self) -> None:
        for file in self.files:
            name, size = str(file["name"]), int(file["bytes"])
            if not _FILE.fullmatch(name):
                raise CheckpointError(f"{self.folder / NAME} names the file {name!r}, which is not one of a checkpoint")
            path = self.folder / name
            if not path.is_file():
                raise CheckpointError(f"{path} is missing; the checkpoint is not complete")
            if path.stat().st_size != size:
                raise CheckpointError(f"{path} has {path.stat().st_size} bytes, not {size}; it was cut or replaced")
        for name, stored in self.tensors.items():
            whole = Chunk((0,) * len(stored.shape), stored.shape)
            for piece in stored.pieces:
                if not 0 <= piece.file < len(self.files) or piece.chunk.common(whole) != piece.chunk:
                    raise ValueError(f"a piece of {name} lies outside the tensor or the files")
            if sum(piece.chunk.numel for piece in stored.pieces) != whole.numel:
                raise ValueError(f"the pieces of {name} do not make the whole tensor")

    def kinds(self, prefix: str) -> list[str]:
        """Return the sorted kinds of tensors under *prefix*: ``exp_avg`` for ``optimizer.exp_avg/lm_head.weight``."""
        return sorted({name[len(prefix) :].partition("/")[0] for name in self.tensors if name.startswith(prefix)})

    def verify(self, index: int) -> None:
        """Read file *index* whole; raise CheckpointError unless its checksum, shapes and dtypes are those saved."""
        file = self.files[index]
        path, found = self.folder / file["name"], 0
        with path.open("rb", buffering=0) as stream:
            buffer = memoryview(bytearray(min(_CHUNK, max(1, file["bytes"]))))
            while count := stream.readinto(buffer):
                found = zlib.crc32(buffer[:count], found)
        if found != file["crc32"]:
            raise CheckpointError(f"{path} is damaged: its checksum is {found}, not {file['crc32']}")
        try:
            with safe_open(path, framework="pt") as stored:
                self._compare(path, index, stored)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is no safetensors file, or lacks a tensor: {error}") from error

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


def _parse(where: Path) -> dict[str, Any]:
    if not where.is_dir():
        raise CheckpointError(f"there is no checkpoint at {where}")
    path = where / NAME
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; {where} is no checkpoint, or not a complete one") from None
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
    """Write the manifest into *folder* and flush it to the disk."""
    listed = {
        name: [
            stored.shape,
            dtype_name(stored.dtype),
            [[piece.file, piece.chunk.offsets, piece.chunk.sizes] for piece in stored.pieces],
        ]
        for name, stored in tensors.items()
    }
    content = json.loads(json.dumps({**about, "format": FORMAT, "files": files, "tensors": listed}))
    with (folder / NAME).open("w") as stream:
        json.dump({**content, "checksum": _checksum(content)}, stream)
        stream.flush()
        os.fsync(stream.fileno())


def _checksum(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())
