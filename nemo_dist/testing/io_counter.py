"""Count the bytes of tensor data that are read from safetensors files in this process."""

from __future__ import annotations

import sys
from threading import Lock
from typing import Any

import safetensors
import torch


class BytesRead:
    """Within the context, ``bytes`` grows by the size of every tensor or slice read from an open safetensors file.

    Headers are not counted. ``safe_open`` is replaced in every module that imported it by name.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._lock = Lock()  # transformers reads with several threads

    def __enter__(self) -> BytesRead:
        self._original: Any = safetensors.safe_open
        counter = self

        class Watched:
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                self._file = counter._original(*args, **kwargs)

            def __enter__(self) -> Watched:
                self._file.__enter__()
                return self

            def __exit__(self, *error: Any) -> None:
                self._file.__exit__(*error)

            def __getattr__(self, name: str) -> Any:
                return getattr(self._file, name)

            def get_slice(self, name: str) -> _Slice:
                return _Slice(self._file.get_slice(name), counter)

            def get_tensor(self, name: str) -> torch.Tensor:
                return counter._count(self._file.get_tensor(name))

        self._replace(self._original, Watched)
        self._watched = Watched
        return self

    def __exit__(self, *error: object) -> None:
        self._replace(self._watched, self._original)

    def _replace(self, old: Any, new: Any) -> None:
        for module in list(sys.modules.values()):
            if getattr(module, "__dict__", {}).get("safe_open") is old:
                module.safe_open = new  # type: ignore[attr-defined]

    def _count(self, tensor: torch.Tensor) -> torch.Tensor:
        with self._lock:
            self.bytes += tensor.numel() * tensor.element_size()
        return tensor


class _Slice:
    def __init__(self, original: Any, counter: BytesRead) -> None:
        self._original = original
        self._counter = counter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._counter._count(self._original[index])
