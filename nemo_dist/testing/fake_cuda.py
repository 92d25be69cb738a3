"""Replace the few ``torch.cuda`` calls that Megatron-FSDP makes, so that it runs on gloo ranks; for tests only.

The package orders its communication with CUDA streams and queries the current device; its arithmetic and collectives
are plain torch. On the CPU everything runs in program order except its asynchronous all-gathers, which gloo runs on
threads of its own, and no stream would order them with the reuse of buffers. So collectives are waited for where they
are started, and then streams and events that do nothing are correct. This cannot detect a missing wait between streams;
that takes a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # reads torch.cuda when it is imported, which must be the real one

from nemo_dist.testing.remote_call import Reference


class _Device(str):
    """The CPU's device: "cpu" where a tensor is created on it, "0" where it is formatted into a device name."""

    def __format__(self, spec: str) -> str:
        return "0"


class _Event:
    def wait(self, stream: Any = None) -> None:
        """Return at once, as the recorded work is done."""


class _Stream:
    def wait_stream(self, stream: Any) -> None:
        """Return at once, as on the CPU the other stream's work is done."""

    def record_event(self, event: Any = None) -> _Event:
        """Return an event whose work is done."""
        return _Event()


def _inside(stream: Any) -> AbstractContextManager[None]:
    return nullcontext()


@contextmanager
def _finished(group: Any, device: Any = None, async_ops: bool = False) -> Iterator[_Event]:
    """Coalesce the collectives that are started within the context, and wait for them, asynchronous or not."""
    with torch.distributed._coalescing_manager(group, device):
        yield _Event()


@contextmanager
def cuda_calls() -> Iterator[None]:
    """Within the context, replace ``torch.cuda``'s current_device, Stream, stream, current_stream and synchronize.

    Also replaced are ``Tensor.cuda``, which the package calls on one small CPU tensor, and its coalescing of
    collectives.
    """
    import megatron_fsdp.param_and_grad_buffer as buffers  # an extra, so not at the top

    replaced: dict[str, Any] = {
        "current_device": lambda: _Device("cpu"),
        "Stream": _Stream,
        "stream": _inside,
        "current_stream": lambda device=None: _Stream(),
        "synchronize": lambda device=None: None,
    }
    with (
        mock.patch.multiple(torch.cuda, **replaced),
        mock.patch.object(torch.Tensor, "cuda", lambda tensor: tensor),
        mock.patch.object(buffers, "_coalescing_manager", _finished),
    ):
        yield


def _run(function: Reference, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with cuda_calls():
        return function.find()(*args, **kwargs)


class WithCudaCalls:
    """A pool of ranks whose functions run under ``cuda_calls``."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool

    def run(
        self, function: Callable[..., Any], /, *args: Any, timeout: float | None = None, **kwargs: Any
    ) -> list[Any]:
        """Call *function* with the same arguments on every rank and return the results in rank order."""
        __tracebackhide__ = True
        results: list[Any] = self._pool.run(_run, Reference.to(function), args, kwargs, timeout=timeout)
        return results
