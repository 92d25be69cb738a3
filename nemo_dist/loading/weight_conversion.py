"""Convert weights whole and slice them after, where converting this rank's slices would give other values.

transformers converts weights while it reads them. Of a DTensor parameter it reads this rank's slice of every tensor
that the parameter is made from, and converts the slices. That gives the slice of the converted whole only where no
operation mixes what a sharded dim holds: concatenating the halves of two tensors is not half of their concatenation.
What ``conversion_rules`` does not know to be right is read and converted whole, one parameter after the other, and
sliced then. Of what is converted in slices, one parameter of each kind is converted whole as well, and compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import WeightConverter

from nemo_dist.errors import CheckpointError
from nemo_dist.loading.conversion_rules import Conversion, conversions, keeps_slices, sharded
from nemo_dist.mesh.dtensor import local_slice

Finish = Callable[[dict[str, Tensor], Any], dict[str, Tensor]]  # converted tensors, loading info -> what to load


class _Unread:
    """A tensor of the checkpoint that is read when its conversion begins, so that few whole tensors are held."""

    def __init__(self, source: Any, device: Any = None, dtype: Any = None) -> None:
        self._source, self._device, self._dtype = source, device, dtype

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def __getitem__(self, everything: Any) -> _Unread:
        return self

    def to(self, device: Any = None, dtype: Any = None) -> _Unread:
        return _Unread(self._source, device, dtype)

    def read(self) -> Tensor:
        whole: Tensor = self._source[...]
        return whole.to(device=self._device, dtype=self._dtype)


def convert_and_load(original: Callable[..., Any], model: Any, state: Any, options: Any, *rest: Any) -> Any:
    """Load *state* into *model* as *original* does, transformers' ``convert_and_load_state_dict_in_model``.

    Where converting slices of it would give other values, the weights are converted whole.

    Raises CheckpointError, naming the parameters, where converting slices gave other bits than converting whole.
    """
    mapping = options.weight_mapping or []
    converts = any(isinstance(one, WeightConverter) for one in mapping)
    parameters = model.state_dict() if converts else {}
    if not any(map(sharded, parameters.values())):
        return original(model, state, options, *rest)
    found = [
        conversion
        for conversion in conversions(state, mapping, model.base_model_prefix, parameters)
        if any(sharded(parameters.get(name)) for name in conversion.targets)
    ]
    sliced: list[Conversion] = []
    whole: list[Conversion] = []
    for conversion in found:
        (sliced if keeps_slices(conversion, state, parameters) else whole).append(conversion)
    with _converted_whole(model, whole, parameters, lambda made, info: _own_slices(made, parameters, info)):
        answer = original(model, _deferred(state, whole), options, *rest)
    if sliced:
        _prove(original, model, state, options, sliced, *rest)
    return answer


def _deferred(state: Mapping[str, Any], whole: Sequence[Conversion]) -> dict[str, Any]:
    names = {name for conversion in whole for name in conversion.names}
    return {name: _Unread(source) if name in names else source for name, source in state.items()}


@contextmanager
def _converted_whole(
    model: Any, whole: Sequence[Conversion], parameters: Mapping[str, Any], finish: Finish
) -> Iterator[None]:
    """Within the context, transformers reads and converts *whole* without sharding, and loads what *finish* returns."""
    firsts = {conversion.first for conversion in whole}
    plain = {
        name: torch.empty(parameters[name].shape, dtype=parameters[name].dtype, device="meta")
        for conversion in whole
        for name in conversion.targets
        if name in parameters
    }
    original = WeightConverter.convert

    def convert(self: Any, layer_name: str, model: Any = None, **others: Any) -> Any:
        if layer_name not in firsts:
            return original(self, layer_name, model=model, **others)
        for pattern, futures in self.collected_tensors.items():
            self.collected_tensors[pattern] = [_reader(future) for future in futures]
        return finish(original(self, layer_name, model=model, **others), others["loading_info"])

    patched: Any = WeightConverter
    patched.convert = convert
    model.__dict__["state_dict"] = lambda: {**parameters, **plain}  # by which transformers decides what to slice
    try:
        yield
    finally:
        del model.__dict__["state_dict"]
        patched.convert = original


def _reader(future: Any) -> Callable[[], Tensor]:
    """Return the function that reads the source in *future*, which transformers calls when it converts."""

    def read() -> Tensor:
        source = future.result() if isinstance(future, Future) else future()
        return source.read()  # type: ignore[no-any-return]

    return read


def _tensors(made: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _own_slices(made: Mapping[str, Any], parameters: Mapping[str, Any], info: Any) -> dict[str, Tensor]:
    """Return this rank's slices of the converted tensors; note in *info* those whose shapes are not the parameters'."""
    kept: dict[str, Tensor] = {}
    for name, value in _tensors(made).items():
        parameter = parameters.get(name)
        if not isinstance(parameter, DTensor):
            kept[name] = value
        elif value.shape == parameter.shape:
            kept[name] = local_slice(value.detach(), parameter).clone()  # a copy, or the slice would keep all alive
        else:
            info.missing_keys.discard(name)
            info.mismatched_keys.add((name, value.shape, parameter.shape))
    return kept


def _prove(
    original: Callable[..., Any], model: Any, state: Any, options: Any, sliced: Sequence[Conversion], *rest: Any
) -> None:
    """Convert one parameter of each kind in *sliced* whole, and compare this rank's slice with what was loaded."""
    loaded = model.state_dict()
    filled = [one for one in sliced if not any(loaded[name].is_meta for name in one.targets if name in loaded)]
    samples = list({one.kind(state, loaded): one for one in reversed(filled)}.values())
    if not samples:
        return
    wrong: list[str] = []

    def compare(made: dict[str, Tensor], info: Any) -> dict[str, Tensor]:
        for name, value in _tensors(made).items():
            parameter = loaded[name]
            same = value.shape == parameter.shape and _same_bits(local_slice(value, parameter), parameter.to_local())
            wrong.extend([] if same else [name])
        return {}

    names = [name for conversion in samples for name in conversion.names]
    with _converted_whole(model, samples, loaded, compare):
        info, *_ = original(model, _deferred({name: state[name] for name in names}, samples), options, *rest)
    wrong += sorted(info.conversion_errors)
    if wrong:
        raise CheckpointError(
            f"{', '.join(wrong)}: converted from this rank's slices of the checkpoint, and converted whole and sliced "
            "after, the values differ; load the checkpoint with transformers on one process, save_pretrained, load that"
        )


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().to(one.device).view(torch.uint8))
