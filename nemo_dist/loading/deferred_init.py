"""Draw the initial weights of one process, one tensor at a time, and keep only this rank's slices.

While a model is built under :class:`DeferredInit`, its uninitialised tensors, and large constants and draws, are on the
meta device, and the operations on them (``normal_``, ``zero_``, a copy, ...) are recorded. A random draw is also run on
a scratch tensor, which is discarded, so that the CPU generator advances exactly as on one process. Later, when the
parameters are sharded, ``fill`` replays the recorded operations of one tensor after the other, from the recorded
generator states. So every topology starts from the same bits as a single process, and a rank holds no more than its
shards and one tensor being drawn.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, cast

import attrs
import torch
from torch import Tensor, nn
from transformers.initialization import TORCH_INIT_FUNCTIONS

from nemo_dist.errors import PluginError
from nemo_dist.mesh.dtensor import filled, parameter_slots
from nemo_dist.torch_private import (
    TorchDispatchMode,
    disable_current_modes,
    storage_id,
    tensors_in,
    tree_map_only,
)

_aten = torch.ops.aten
_FRESH = {_aten.empty.memory_format, _aten.empty_strided.default, _aten.new_empty.default}
_LARGE = {_aten.zeros.default, _aten.ones.default, _aten.full.default, _aten.randn.default, _aten.rand.default}
_OVERWRITING = {
    _aten.normal_.default,
    _aten.uniform_.default,
    _aten.zero_.default,
    _aten.fill_.Scalar,
    _aten.fill_.Tensor,
    _aten.copy_.default,
}
_LARGE_NUMEL = 1 << 16  # smaller constants are created at once: tables of rotary embeddings are computed from them
_INIT_NAMES = (*TORCH_INIT_FUNCTIONS, "_no_grad_trunc_normal_")
_INIT_HOMES: tuple[dict[str, Any], ...] = (vars(torch.nn.init), TORCH_INIT_FUNCTIONS)
_RANDOM = torch.Tag.nondeterministic_seeded


@attrs.frozen(eq=False)
class Call:
    """One recorded operation on deferred (meta) tensors.

    ``generator`` is the CPU generator's state before a random operation, None for another; ``reads`` and ``writes`` are
    the ids of the deferred storages that it reads and writes; ``overwrites`` says that it replaces the whole content of
    the storage of its first argument.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    result: Any
    generator: Tensor | None
    reads: frozenset[int]
    writes: frozenset[int]
    overwrites: bool

    @classmethod
    def of(
        cls,
        function: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        result: Any,
        generator: Tensor | None,
        replaces: bool,
    ) -> Call:
        """Record a call; *replaces* says that *function* replaces the whole content of its first argument."""
        used = {storage_id(tensor) for tensor in tensors_in((args, kwargs)) if tensor.is_meta}
        changed = {storage_id(tensor) for tensor in tensors_in(result) if tensor.is_meta}
        schema = getattr(function, "_schema", None)
        for argument, value in zip(schema.arguments if schema else (), args, strict=False):
            if argument.is_write:
                changed |= {storage_id(tensor) for tensor in tensors_in(value) if tensor.is_meta}
        overwrites = replaces and args[0].is_meta and covers_its_storage(args[0])
        reads = used - {storage_id(args[0])} if overwrites else used
        return cls(function, args, kwargs, result, generator, frozenset(reads), frozenset(changed), overwrites)


class DeferredInit(TorchDispatchMode):
    """Record how a model is initialised: a context for building the model; see the module docstring."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls: list[Call] = []
        self._writers: defaultdict[int, list[int]] = defaultdict(list)  # storage -> indices of the calls that write it
        self._origin: dict[str, Tensor] = {}

    def __enter__(self) -> DeferredInit:
        self._originals = [(home, name, home[name]) for home in _INIT_HOMES for name in _INIT_NAMES if name in home]
        for home, name, function in self._originals:
            home[name] = self._as_one_call(function)
        return cast(DeferredInit, super().__enter__())  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for home, name, function in self._originals:
            home[name] = function

    def _as_one_call(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return *function* of ``torch.nn.init``, wrapped to record a call on a deferred tensor as one operation.

        Some of these functions redraw depending on the values they drew, and some silently skip meta tensors.
        """

        @wraps(function)
        def recorded(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not tensor.is_meta:
                return function(tensor, *args, **kwargs)
            generator = torch.get_rng_state()
            with disable_current_modes():
                self._advance(function, (tensor, *args), kwargs)
            self._record(Call.of(function, (tensor, *args), kwargs, tensor, generator, replaces=True))
            return tensor

        return recorded

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        deferred = any(tensor.is_meta for tensor in tensors_in((args, kwargs)))
        if not deferred and not _makes_deferrable(function, args, kwargs):
            return function(*args, **kwargs)
        if deferred and _writes_to_real(function, args):
            args, kwargs = tree_map_only(Tensor, self._real, (args, kwargs))
            return function(*args, **kwargs)
        if not deferred:
            kwargs = {**kwargs, "device": torch.device("meta")}
        generator = torch.get_rng_state() if _RANDOM in function.tags else None
        if generator is not None:
            self._advance(function, args, kwargs)
        result = function(*args, **kwargs)
        if not _is_view(function):
            self._record(Call.of(function, args, kwargs, result, generator, replaces=function in _OVERWRITING))
        return result

    def _advance(self, function: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Run a draw on scratch tensors, to advance the CPU generator as it would."""
        scratch = tree_map_only(Tensor, lambda tensor: torch.empty_like(tensor, device="cpu"), (args, dict(kwargs)))
        if "device" in scratch[1]:
            scratch[1]["device"] = torch.device("cpu")
        function(*scratch[0], **scratch[1])

    def _real(self, tensor: Tensor) -> Tensor:
        return self.replay(tensor) if tensor.is_meta else tensor

    def _record(self, call: Call) -> None:
        for storage in call.writes:
            self._writers[storage].append(len(self._calls))
        self._calls.append(call)

    def hollow(self, model: nn.Module) -> None:
        """Record the initial tensor of every parameter and buffer by name, and put all parameters on meta."""
        tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        self._origin = {name: tensor.detach() for name, tensor in tensors}
        hollowed: dict[nn.Parameter, nn.Parameter] = {}  # one for all modules that share a parameter
        for _, module, name, parameter in parameter_slots(model):
            if not parameter.is_meta:
                if parameter not in hollowed:
                    meta = parameter.detach().to("meta")
                    hollowed[parameter] = nn.Parameter(meta, requires_grad=parameter.requires_grad)
                setattr(module, name, hollowed[parameter])

    @torch.no_grad()
    def fill(self, part: nn.Module, device: torch.device) -> None:
        """Fill the parameters and buffers of *part* on *device*; a DTensor parameter gets this rank's shard."""
        done: dict[int, nn.Parameter] = {}
        for path, module, name, parameter in parameter_slots(part):
            if parameter.is_meta or id(parameter) in done:
                if id(parameter) not in done:
                    done[id(parameter)] = self.filled(path, parameter, device)
                setattr(module, name, done[id(parameter)])
        for prefix, module in part.named_modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                path = f"{prefix}.{name}" if prefix else name
                module._buffers[name] = (self.value(path) if buffer.is_meta else buffer).to(device)

    def filled(self, name: str, parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
        """Return a parameter laid out like *parameter* with its initial values on *device*."""
        return filled(parameter, self.value(name), device)

    def value(self, name: str) -> Tensor:
        """Return the whole initial tensor called *name* in the model passed to ``hollow``, on the CPU.

        Raises PluginError for a name that the model did not have.
        """
        if name not in self._origin:
            raise PluginError(f"{name} is on the meta device, but the model had no such tensor when it was built")
        origin = self._origin[name]
        return self.replay(origin) if origin.is_meta else origin

    def leaves(self, origin: Tensor) -> bool:
        """Whether nothing has written the deferred tensor *origin* since it was made: it has what was in memory."""
        written = (self._calls[index].function not in _FRESH for index in self._writers[storage_id(origin)])
        return origin.is_meta and origin.numel() > 0 and not any(written)

    @torch.no_grad()
    def replay(self, origin: Tensor) -> Tensor:
        """Return the values that the deferred tensor *origin* has on one process; leaves the CPU generator alone."""
        storages: dict[int, Tensor] = {}
        before = torch.get_rng_state()
        try:
            for index in self._history(storage_id(origin)):
                self._repeat(index, storages)
        finally:
            torch.set_rng_state(before)
        return view_of(storages, origin)

    def _repeat(self, index: int, storages: dict[int, Tensor]) -> None:
        """Run the recorded call *index* on the CPU tensors *storages*."""
        call = self._calls[index]
        if call.generator is not None:
            torch.set_rng_state(call.generator)
        run(call, storages)

    def _history(self, storage: int) -> list[int]:
        """Return which recorded calls the final content of *storage* depends on, in the order in which they ran."""
        needed: set[int] = set()
        open_questions = [(storage, len(self._calls))]
        while open_questions:
            wanted, before = open_questions.pop()
            for index in reversed(self._writers[wanted]):
                if index >= before:
                    continue
                call = self._calls[index]
                if index not in needed:
                    needed.add(index)
                    open_questions += [(read, index) for read in call.reads if read != wanted]
                if call.overwrites:
                    break
        return sorted(needed)


def _writes_to_real(function: Any, args: tuple[Any, ...]) -> bool:
    """Whether *function* changes an argument that is not deferred, such as a buffer that transformers fills again."""
    schema = getattr(function, "_schema", None)
    return any(
        argument.is_write and not tensor.is_meta
        for argument, value in zip(schema.arguments if schema else (), args, strict=False)
        for tensor in tensors_in(value)
    )


def _makes_deferrable(function: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether *function* creates a tensor to defer: uninitialised, a large constant or draw, or beside a deferred one.

    The first two of floating point and on the CPU. The last is on meta, as a model may create a tensor on the device of
    a weight, and that of a deferred one is meta.
    """
    device = torch.device(kwargs.get("device") or "cpu")
    if device.type != "cpu":
        return device.type == "meta"
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    if not dtype.is_floating_point:
        return False
    if function in _FRESH:
        return True
    return function in _LARGE and torch.Size(args[0]).numel() >= _LARGE_NUMEL


def run(call: Call, storages: dict[int, Tensor]) -> None:
    """Run *call* on the CPU tensors that replace the deferred ones; raise PluginError where one was never made."""
    overwritten = storage_id(call.args[0]) if call.overwrites else None

    def replaced(tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor
        if storage_id(tensor) not in storages and storage_id(tensor) != overwritten:
            raise PluginError(
                f"an initial weight is computed by {call.function} from a tensor of shape {tuple(tensor.shape)} on the "
                "meta device, whose values are not known; build the model on one process, save_pretrained, and load it"
            )
        return view_of(storages, tensor)

    args, kwargs = tree_map_only(Tensor, replaced, (call.args, dict(call.kwargs)))
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")
    with torch.no_grad():
        results = tensors_in(call.function(*args, **kwargs))
    for recorded, value in zip(tensors_in(call.result), results, strict=True):
        if recorded.is_meta and storage_id(recorded) not in storages:
            view_of(storages, recorded).copy_(value)


def view_of(storages: dict[int, Tensor], recorded: Tensor) -> Tensor:
    """Return the CPU tensor that replaces the meta tensor *recorded*: a view of the same layout of its CPU storage."""
    key = storage_id(recorded)
    if key not in storages:
        storages[key] = torch.empty(
            recorded.untyped_storage().nbytes() // recorded.element_size(), dtype=recorded.dtype
        )
    return storages[key].as_strided(recorded.size(), recorded.stride(), recorded.storage_offset())


def _is_view(function: Any) -> bool:
    """Whether *function* only returns views of its arguments; views are rebuilt from size, stride and offset."""
    returns = function._schema.returns
    return bool(returns) and all(
        returned.alias_info is not None and not returned.alias_info.is_write for returned in returns
    )


def covers_its_storage(tensor: Tensor) -> bool:
    """Whether *tensor* has as many elements as its storage."""
    return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
