"""The manifest of a checkpoint: its tensors, where their chunks are, everything that is not a tensor, and checksums.

Format 2 names the layout of a tensor, from which the chunks in every file follow, and keeps what is different on every
rank in the file of that rank. Format 1, which is read too, lists all chunks and the state of all ranks.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import attrs
from safetensors import SafetensorError, safe_open

from nemo_dist.checkpoint import stored_tensor
from nemo_dist.checkpoint.json_state import with_tensors
from nemo_dist.checkpoint.layout import Chunk
from nemo_dist.checkpoint.safetensors_writer import DTYPE_OF, DTYPES
from nemo_dist.checkpoint.stored_tensor import Stored, key
from nemo_dist.errors import CheckpointError
from nemo_dist.loading.other_formats import way_in

FORMAT = 2
NAME = "manifest.json"
IDENTITY = "hf"  # the folder with config and tokenizer, which an offline export needs
_CHUNK = re.compile(r"(model|optimizer|plugin)\b.*\[[0-9:,]*\]$", re.DOTALL)  # the name of a chunk of a tensor
OF_RANK = "rank"  # the tensor, in each rank's file, with the bytes of the JSON of what is different on every rank
_FILE = re.compile(r"rank-[0-9]{5}\.safetensors")
_SEAL = re.compile(rb',"checksum":([0-9]+)\}\s*')
_BUFFER = 1 << 24


def file_name(rank: int) -> str:
    """Return the name of the file of *rank*."""
    return f"rank-{rank:05d}.safetensors"


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
        return {"format", "checksum", "tensors"} <= _parse(folder)[1].keys()
    except CheckpointError:
        return False


@attrs.frozen
class Slice:
    """A part to read: the index of its file, its chunk's name there, ``spans`` of it (None: all), and where it goes."""

    file: int
    label: str
    spans: tuple[slice, ...] | None
    into: Chunk


@attrs.frozen(kw_only=True, slots=False)
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
        """Read and validate the manifest in *folder*; raise CheckpointError for one that is missing, damaged or newer.

        The files that it names are not looked at; see ``look_for_files`` and ``verify``.
        """
        where = Path(folder)
        text, content = _parse(where)
        if not isinstance(content.get("format"), int) or content["format"] > FORMAT:
            raise CheckpointError(
                f"{where} has checkpoint format {content.get('format')!r}, and this version reads up to {FORMAT}; "
                "update nemo_dist"
            )
        with _readable(where / NAME):
            checksum = content.pop("checksum", None)
            found = _checksum_1(content) if content["format"] == 1 else _checksum(text)
            if checksum != found:
                raise CheckpointError(f"{where / NAME} is damaged: its checksum is {checksum!r}, not {found}")
            tensors = stored_tensor.from_json(content.pop("layouts", []), content.pop("tensors"))
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
            if not _FILE.fullmatch(_require(file["name"], str, "a name")):
                raise CheckpointError(
                    f"{self.folder / NAME} names the file {file['name']!r}, which is not one of a checkpoint"
                )
        for name, stored in self.tensors.items():
            if stored.dtype not in DTYPE_OF:
                raise ValueError(f"{name} has the dtype {stored.dtype!r}")
            stored.where.check(name, stored.shape, len(self.files))

    def look_for_files(self) -> None:
        """Raise CheckpointError for a file that is missing or has another size than when it was saved."""
        for file in self.files:
            self._check_file(self.folder / file["name"], file["bytes"])
        self._look_for_companions()

    def _look_for_companions(self) -> None:
        with self.readable():
            for file in self.companions:
                self._check_file(self.folder / IDENTITY / file["name"], file["bytes"])

    def _check_about(self) -> None:
        """Raise ValueError or KeyError where ``about`` or the entry of a file lacks a value, or has a wrong type."""
        about = self.about
        _require(about.get("step"), int | None, "step")
        _require(about.get("plugin_states", {}), dict, "plugin_states")
        _require(about["model"], str, "model")
        _require(about["optimizer"], str | None, "optimizer")
        _require(about["extra"], object, "extra")
        _require(about["schedulers"], list, "schedulers")
        for name, value in about["topology"].items():
            _require(value, int | str, name)
        for file in (*self.files, *self.companions):
            _require(file["crc32"], int, "a checksum")
            _require(file["bytes"], int, "a size")
            for name in _require(file.get("not_finite", []), list, "not_finite"):
                _require(name, str, "not_finite")
        for dp_rank in self.dp_ranks:
            _require(dp_rank, int, "dp_rank")
        if not self.dp_ranks:
            raise ValueError("it lists no ranks")
        if self._lists_ranks:
            for rank in about["ranks"]:
                self._check_rank(rank)
        elif about["data"] not in (None, "equal", "each"):
            raise ValueError(f"data is {about['data']!r}")
        if about["optimizer"] is not None:
            for what in ("counts", "options"):
                for value, names in _require(about[what], list, what):
                    _require(value, dict, what)
                    for name in _require(names, list, what):
                        _require(name, str, what)
            if not about["counts"] and self.kinds("optimizer."):
                raise ValueError("it has moments of the optimizer, but no step counts")

    def _check_rank(self, rank: Any) -> None:
        _require(rank["generators"], dict, "generators")
        _require(rank["data"], object, "data")
        plugins = self.about.get("plugin_states", {})
        if _require(rank.get("plugin_states", {}), dict, "plugin_states").keys() != plugins.keys():
            raise ValueError("its ranks have states of other plugins than it lists")

    @property
    def _lists_ranks(self) -> bool:
        return bool(self.about["format"] < 2)

    @cached_property
    def dp_ranks(self) -> list[int]:
        """The data-parallel coordinate of each rank that saved: which batch it read."""
        listed = _require(self.about["ranks"], list, "ranks") if self._lists_ranks else self.files
        return [rank["dp_rank"] for rank in listed]

    @property
    def data(self) -> str | None:
        """Whether the ranks saved "equal" states of data, "each" its own, or None."""
        if not self._lists_ranks:
            return self.about["data"]  # type: ignore[no-any-return]
        states = [rank["data"] for rank in self.about["ranks"]]
        if any(state is None for state in states):
            return None
        return "equal" if all(state == states[0] for state in states) else "each"

    def of_rank(self, index: int, tensors: bool = False) -> Mapping[str, Any]:
        """Return what rank *index* saved of its own: "generators", "data" and "plugin_states", as JSON.

        With *tensors*, read those of plugins, too; without, their names stand in their places. Raises CheckpointError
        where its file does not have them.
        """
        if self._lists_ranks:
            return self.about["ranks"][index]  # type: ignore[no-any-return]
        path = self.folder / self.files[index]["name"]
        with _readable(path), open_file(path) as stored:
            text = stored.get_tensor(OF_RANK).numpy().tobytes()
            own = with_tensors(text, stored.get_tensor) if tensors else json.loads(text)
            self._check_rank(own)
        return own  # type: ignore[no-any-return]

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

    def slices(self, name: str, wanted: Chunk) -> Iterator[Slice]:
        """Yield what to read for the chunk *wanted* of the tensor *name*."""
        for piece in self.tensors[name].meeting(wanted):
            common = piece.chunk.common(wanted)
            if common is not None:
                spans = None
                if common != piece.chunk:
                    there = common.within(piece.chunk)
                    spans = tuple(slice(a, a + n) for a, n in zip(there.offsets, there.sizes, strict=True))
                yield Slice(piece.file, key(name, piece.chunk), spans, common.within(wanted))

    def verify(self, index: int) -> None:
        """Read file *index* whole; raise CheckpointError unless its checksum, shapes and dtypes are those saved."""
        path = self.folder / self.files[index]["name"]
        self._check_file(path, self.files[index]["bytes"])
        _verify(path, self.files[index])
        try:
            with open_file(path) as stored:
                self._compare(path, index, stored)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is no safetensors file, or lacks a tensor: {error}") from error

    def verify_companions(self) -> None:
        """Raise CheckpointError unless the sizes and checksums of the files in ``hf`` are those saved."""
        self._look_for_companions()
        for file in self.companions:
            _verify(self.folder / IDENTITY / file["name"], file)

    def _compare(self, path: Path, index: int, stored: Any) -> None:
        """Raise CheckpointError when the file has other chunks than the manifest says, or another shape or dtype.

        A checksum alone does not protect against a file, or a manifest, that was made to match it.
        """
        more = set(filter(_CHUNK.match, stored.keys()))
        for name, tensor in self.tensors.items():
            for chunk in tensor.in_file(index):
                label = key(name, chunk)
                found = stored.get_slice(label)
                more.discard(label)
                if (tuple(found.get_shape()), found.get_dtype()) != (chunk.sizes, DTYPES[DTYPE_OF[tensor.dtype]]):
                    raise CheckpointError(f"{path} has {name} as {found.get_dtype()} {found.get_shape()}")
        if more:
            raise CheckpointError(f"{path} has {min(more)}, which {self.folder / NAME} does not name")


def open_file(path: Path) -> Any:
    """Return the open safetensors file at *path*; raise CheckpointError where it cannot be opened."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's own error of mapping a file is the second
        raise CheckpointError(f"{path} cannot be opened: {error}") from error


def _verify(path: Path, file: Mapping[str, Any]) -> None:
    try:
        found = _crc32(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if found != file["crc32"]:
        raise CheckpointError(f"{path} is damaged: its checksum is {found}, not {file['crc32']}")


def _crc32(path: Path) -> int:
    found = 0
    with path.open("rb", buffering=0) as stream:
        buffer = memoryview(bytearray(min(_BUFFER, max(1, path.stat().st_size))))
        while count := stream.readinto(buffer):
            found = zlib.crc32(buffer[:count], found)
    return found


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


def _parse(where: Path) -> tuple[bytes, dict[str, Any]]:
    """Return the manifest in *where*, as bytes and as JSON."""
    if not where.is_dir():
        raise CheckpointError(f"there is no checkpoint at {where}")
    path = where / NAME
    if not path.is_file():
        other = way_in(where) or f"{where} is no checkpoint, or not a complete one"
        raise CheckpointError(f"{path} is missing; {other}")
    try:
        text = path.read_bytes()
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is malformed: it must be a JSON object (got {type(content).__name__})")
    return text, content


def _checksum(text: bytes) -> int | None:
    """Return the checksum of what stands before it in *text*; None where it does not stand last."""
    end = text.rfind(b',"checksum":')
    return zlib.crc32(text[:end]) if end >= 0 and _SEAL.fullmatch(text, end) else None


def _checksum_1(content: Mapping[str, Any]) -> int:
    """Return the checksum of format 1: of *content* without it, with sorted keys."""
    return zlib.crc32(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


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
    listed = stored_tensor.to_json(tensors)
    with (folder / NAME).open("wb") as stream:
        stream.write(sealed({**about, "format": FORMAT, "companions": companions, **listed, "files": files}))
        stream.flush()
        os.fsync(stream.fileno())


def sealed(content: Mapping[str, Any]) -> bytes:
    """Return *content*, of format 2, as the bytes of a manifest: its checksum is that of the bytes before it."""
    text = json.dumps(content, separators=(",", ":"))[:-1].encode()
    return text + b',"checksum":%d}' % zlib.crc32(text)
