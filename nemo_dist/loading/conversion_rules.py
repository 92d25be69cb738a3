"""Find what transformers converts of a checkpoint, and whether converting slices gives the slices of the whole.

A converter has a list of operations: it merges the experts of a layer, concatenates, chunks, transposes, dequantises.
``keeps_slices`` decides by the operations and by the sharded dims of what they make; what it does not know, it denies.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
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
