"""Convert weights whole and slice them after, where converting this rank's slices would give other values.

transformers converts weights while it reads them: it merges the experts of a layer, concatenates, chunks, transposes,
dequantises. Of a DTensor parameter it reads this rank's slice of every tensor that the parameter is made from, and
converts the slices. That gives the slice of the converted whole only where no operation mixes what a sharded dim holds:
concatenating the halves of two tensors is not half of their concatenation. ``keeps_slices`` decides by the operations
and the sharded dims. What it does not know to be right is read and converted whole, one parameter after the other, and
sliced then. Of what is converted in slices, one parameter of each kind is converted whole as well, and compared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Interleave,
    MergeModulelist,
    PermuteForRope,
    Split,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import Mxfp4Dequantize

from nemo_dist.errors import CheckpointError
from nemo_dist.mesh.dtensor import local_slice

Finish = Callable[[dict[str, Tensor], Any], dict[str, Tensor]]  # converted tensors, loading info -> what to load


@attrs.frozen(kw_only=True)
class Conversion:
    """What one converter makes: the parameters ``targets``, of the tensors ``sources`` of the checkpoint.

    ``first`` is the first target, the name by which transformers keeps the conversion. ``sources`` has the names of the
    tensors by the converter's pattern that they match, in the order in which they are merged.
    """

    first: str
    targets: tuple[str, ...]
    converter: WeightConverter
    sources: Mapping[str, list[str]]

    @property
    def names(self) -> list[str]:
        """The names of all sources."""
        return [name for names in self.sources.values() for name in names]

    def kind(self, state: Mapping[str, Any], parameters: Mapping[str, Any]) -> object:
        """Return what the arithmetic depends on: conversions of one kind differ only in the values of the tensors."""
        shapes = tuple(tuple(shape_of(state[name]) for name in names) for names in self.sources.values())
        made = tuple(
            (tuple(parameter.shape), str(getattr(parameter, "placements", "")))
            for parameter in (parameters.get(name) for name in self.targets)
            if parameter is not None
        )
        return tuple(self.sources), shapes, made


def shape_of(source: Any) -> tuple[int, ...]:
    """Return the shape of a tensor of the checkpoint, also of one in a file that is not read yet."""
    return tuple(source.shape if isinstance(source, Tensor) else source.get_shape())


def conversions(
    state: Mapping[str, Any], mapping: Sequence[Any], base: str | None, parameters: Mapping[str, Any]
) -> list[Conversion]:
    """Return what the transforms *mapping* convert of the checkpoint *state* into *parameters*, without renamings.

    Follows transformers' loader: the same order of names, and at most one converter per name. ``base`` is the prefix of
    the base model.
    """
    noted = copy.deepcopy(list(mapping))  # a transform keeps notes of what it matched
    renamings = [entry for entry in noted if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in noted if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found: dict[str, tuple[WeightConverter, dict[str, list[str]]]] = {}
    for name in sorted(state, key=dot_natural_key):
        given: Any = parameters
        renamed, pattern = rename_source_key(name, renamings, converters, base, given)
        if pattern is None or renamed not in parameters:
            continue
        _, sources = found.setdefault(renamed, (by_pattern[pattern], {}))
        sources.setdefault(pattern, []).append(name)
    return [
        Conversion(first=first, targets=_targets(first, converter), converter=converter, sources=sources)
        for first, (converter, sources) in found.items()
    ]


def _targets(first: str, converter: WeightConverter) -> tuple[str, ...]:
    patterns = converter.target_patterns
    if patterns[0] not in first:
        return (first,)
    return tuple(first.replace(patterns[0], pattern) for pattern in patterns)


def sharded(parameter: Any) -> bool:
    """Whether *parameter* is a DTensor of which this rank does not hold the whole."""
    return isinstance(parameter, DTensor) and bool(_sharded_dims(parameter))


def _sharded_dims(parameter: DTensor) -> dict[int, list[tuple[Any, int]]]:
    """Return, by tensor dim, the placements that shard it and how many ranks each is over."""
    dims: dict[int, list[tuple[Any, int]]] = {}
    for axis, placement in enumerate(parameter.placements):
        dim, size = getattr(placement, "dim", None), parameter.device_mesh.size(axis)
        if dim is not None and size > 1:
            dims.setdefault(dim % parameter.dim(), []).append((placement, size))
    return dims


def keeps_slices(conversion: Conversion, state: Mapping[str, Any], parameters: Mapping[str, Any]) -> bool:
    """Whether converting this rank's slices of the sources gives its slices of the targets, for all that is known.

    Merging experts that are stored one by one keeps the slices along the merged dim, and any operation keeps those
    along dims that it leaves alone.
    """
    targets = [parameters[name] for name in conversion.targets if name in parameters]
    first = targets[0]
    if not all(isinstance(one, DTensor) and _laid_out_alike(one, first) for one in targets):
        return False
    if any(one.to_local().numel() == 0 for one in targets):  # of no expert there is nothing to merge
        return False
    shapes = [[shape_of(state[name]) for name in names] for names in conversion.sources.values()]
    merges = any(isinstance(operation, MergeModulelist) for operation in conversion.converter.operations)
    if merges:  # of every expert one tensor, without the merged dim
        if any(len(group) != first.shape[0] or len(shape) != first.dim() - 1 for group in shapes for shape in group):
            return False
        shapes = [[(first.shape[0], *shape) for shape in group] for group in shapes]
    flat = [shape for group in shapes for shape in group]
    dims = _sharded_dims(first)
    if any(len(shape) <= dim for shape in flat for dim in dims) or (
        not merges and any(len(shape) == first.dim() - 1 for shape in flat)  # transformers takes it for one expert
    ):
        return False
    mixed = _mixed_dims(conversion.converter.operations, first.dim(), merges)
    return all(
        (dim not in mixed and all(shape[dim] == first.shape[dim] for shape in flat))
        or _evenly_scaled(conversion.converter.operations, placements, [shape[dim] for shape in flat], dim in mixed)
        or _packed_alike(conversion.converter.operations, placements, [shape[dim] for shape in flat], len(shapes))
        for dim, placements in dims.items()
    )


def _laid_out_alike(one: DTensor, other: DTensor) -> bool:
    return one.placements == other.placements and one.device_mesh == other.device_mesh and one.dim() == other.dim()


def _mixed_dims(operations: Sequence[Any], ndim: int, merges: bool) -> set[int]:
    """Return the dims of the target along which *operations* may move elements; those of an unknown one are all."""
    mixed: set[int] = set()
    inside = merges  # before the merge, the dims of one expert, which lack the first
    for operation in operations:
        kind, of_one = type(operation), ndim - inside
        if kind is MergeModulelist and operation.dim == 0:
            inside = False
        elif kind in (Concatenate, Chunk, Split, Interleave):
            mixed.add(operation.dim % of_one + inside)
        elif kind is Transpose and not operation.check_dims:  # which compares the shapes of whole tensors
            mixed |= {operation.dim0 % of_one + inside, operation.dim1 % of_one + inside}
        elif kind is PermuteForRope:
            mixed.add(int(inside))
        elif kind is Fp8Dequantize:
            mixed |= {ndim - 2, ndim - 1}
        elif kind is Mxfp4Dequantize and not inside:
            mixed |= set(range(1, ndim))
        else:
            return set(range(ndim))
    return mixed


def _evenly_scaled(operations: Sequence[Any], placements: list[tuple[Any, int]], sizes: list[int], mixed: bool) -> bool:
    """Whether every rank's slices of weights and scales are whole blocks: an even share of both."""
    ranks = 1
    for placement, size in placements:
        if hasattr(placement, "split_factor"):
            return False
        ranks *= size
    others = [operation for operation in operations if type(operation) is not Fp8Dequantize]
    scaled = len(others) < len(operations) and mixed
    return scaled and all(type(one) is MergeModulelist for one in others) and all(size % ranks == 0 for size in sizes)


def _packed_alike(operations: Sequence[Any], placements: list[tuple[Any, int]], sizes: list[int], packed: int) -> bool:
    """Whether a dim is concatenated from equal pieces, and a rank holds its share of every piece (gate and up)."""
    kinds = [type(operation) for operation in operations]
    if kinds != [MergeModulelist, Concatenate] or len(placements) != 1:
        return False
    placement, ranks = placements[0]
    return getattr(placement, "split_factor", None) == packed and len(set(sizes)) == 1 and sizes[0] % ranks == 0


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
    parameters = model.state_dict()
    mapping = options.weight_mapping or []
    found: list[Conversion] = []
    if any(isinstance(one, WeightConverter) for one in mapping) and any(map(sharded, parameters.values())):
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
