"""Write a safetensors file tensor by tensor: the header first, then each tensor at its offset.

The format: the length of the header in eight bytes, little-endian; the header as JSON; the values of all tensors,
row-major and little-endian, without gaps (https://huggingface.co/docs/safetensors). The safetensors library itself can
only write a file from all tensors at once.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import attrs
import torch
from torch import Tensor

from nemo_dist.checkpoint.chunks import as_bytes
from nemo_dist.plugin.mixed_precision import dtype_name

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
DTYPE_OF = {dtype_name(dtype): dtype for dtype in DTYPES}


@attrs.frozen
class Slot:
    """The place of one tensor in the file: its shape and dtype, and its first and last byte offset after the header."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    stop: int


def slots(tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Slot]:
    """Assign byte offsets to all tensors, widest dtypes first, so that each is aligned in a memory-mapped file."""
    placed: dict[str, Slot] = {}
    start = 0
    for name, (shape, dtype) in sorted(tensors.items(), key=lambda item: -item[1][1].itemsize):
        stop = start + torch.Size(shape).numel() * dtype.itemsize
        placed[name] = Slot(shape, dtype, start, stop)
        start = stop
    return placed


class SafetensorsFile:
    """A safetensors file that is being written: a context manager, at whose end the file is flushed to the disk.

    Leaving the context raises ValueError when an announced tensor was not written.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        self.slots = slots(tensors)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        for name, slot in self.slots.items():
            header[name] = {
                "dtype": DTYPES[slot.dtype],
                "shape": list(slot.shape),
                "data_offsets": [slot.start, slot.stop],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text
        self._file = path.open("wb")
        self._file.write(self.header)
        self._left = set(self.slots)
        self._sum, self._summed = zlib.crc32(self.header), 0

    def write(self, name: str, tensor: Tensor) -> None:
        """Write *tensor* at its offset; raise ValueError when its shape or dtype is not the announced one."""
        slot = self.slots[name]
        if (tuple(tensor.shape), tensor.dtype) != (slot.shape, slot.dtype):
            raise ValueError(
                f"{name} was announced as {slot.dtype} {slot.shape}, but is {tensor.dtype} {tuple(tensor.shape)}"
            )
        values: Any = as_bytes(tensor.cpu()).numpy()
        self._file.seek(len(self.header) + slot.start)
        self._file.write(memoryview(values))
        if slot.start == self._summed:
            self._sum, self._summed = zlib.crc32(values, self._sum), slot.stop
        self._left.discard(name)

    @property
    def nbytes(self) -> int:
        """The size of the complete file in bytes."""
        return len(self.header) + max((slot.stop for slot in self.slots.values()), default=0)

    @property
    def checksum(self) -> int:
        """The CRC-32 of the file; raises ValueError unless its tensors were written in the order of ``slots``."""
        if len(self.header) + self._summed != self.nbytes:
            raise ValueError("the checksum is known only when the tensors were written in the order of their slots")
        return self._sum

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                if self._left:
                    raise ValueError(f"{sorted(self._left)} were announced, but not written")
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()
