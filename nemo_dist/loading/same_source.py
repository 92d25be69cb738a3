"""Describe what a model is loaded from, so that ranks that were given different things are told before they read it."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

from nemo_dist.mesh.store_consensus import brief

_SAMPLE = 4096  # bytes read at each end of the weights of a file
_OF_THE_PLACE = ("_name_or_path", "transformers_version")  # differ where every node has a copy of its own


def config_fields(config: Any) -> dict[str, str]:
    """Return every value of a transformers *config* as short text, by "config.NAME"."""
    return {f"config.{name}": brief(value) for name, value in _plain(config.to_dict()).items()}


def file_fields(files: Iterable[Any] | None) -> dict[str, str]:
    """Return the size of each weight file, and a checksum of its header and of the ends of its weights, by its name.

    Weights that differ in the middle only are not told apart, as that would read every byte on every rank.
    """
    return {os.path.basename(file): _described(file) for file in map(os.fspath, files or ())}


def _described(file: str) -> str:
    size = os.path.getsize(file)
    with open(file, "rb") as opened:
        start = opened.read(8)
        header = min(int.from_bytes(start, "little"), size) if file.endswith(".safetensors") else 0
        read = start + opened.read(header + _SAMPLE)
        opened.seek(max(0, size - _SAMPLE))
        read += opened.read(_SAMPLE)
    return f"{size} bytes ({zlib.crc32(read):08x})"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items() if name not in _OF_THE_PLACE}
    return value
