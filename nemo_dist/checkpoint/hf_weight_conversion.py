"""Undo the weight conversions that transformers applies when it loads, for one group of parameters at a time.

Loading renames, splits and stacks weights, and an export must undo that, so that others can read the files.
transformers does it on the whole state dict at once. Here it runs once on the meta device, to find which saved tensors
are computed from which parameters, and then on the real tensors of one such group at a time. This is the only module
that relies on how transformers saves; ``tests/test_export.py`` tests what is relied on.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from transformers.core_model_loading import WeightConverter, WeightTransform, revert_weight_conversion

from nemo_dist.errors import CheckpointError
from nemo_dist.hf_model import has_adapters, inner_model, name_root, plain_class
from nemo_dist.plugin.mixed_precision import dtype_name
from nemo_dist.torch_private import TorchDispatchMode, storage_id, tensors_in

ShapeAndDtype = tuple[tuple[int, ...], torch.dtype]


def nbytes(layout: ShapeAndDtype) -> int:
    """Return the size in bytes of a tensor with this shape and dtype."""
    return torch.Size(layout[0]).numel() * layout[1].itemsize


def plain_config(model: Any, dtype: torch.dtype | None) -> Any:
    """Return a copy of the config of *model* as ``save_pretrained`` writes it, with the *dtype* of the weights."""
    config = copy.deepcopy(model.config)
    config.architectures = [plain_class(model).__name__]
    config.dtype = dtype_name(dtype or model.dtype)
    return config


def skeleton(model: Any) -> Any:
    """Return an unsharded copy of *model* on the meta device, with the weight conversions that it was loaded with."""
    with torch.device("meta"):
        bare = plain_class(model)(copy.deepcopy(model.config))
    known = getattr(model, "_weight_conversions", None)
    if known is not None:
        bare._weight_conversions = [kept for conversion in known if (kept := unquantized(conversion)) is not None]
    return bare


def unquantized(conversion: WeightTransform) -> WeightTransform | None:
    """Return *conversion* without the operations of a quantizer, None if nothing else is left.

    A quantized checkpoint is dequantized while it is read, and exported like one that never was quantized.
    """
    if not isinstance(conversion, WeightConverter):
        return conversion
    quantizers = [one.hf_quantizer for one in conversion.operations if hasattr(one, "hf_quantizer")]
    if not quantizers:
        return conversion
    others = [one for one in conversion.operations if not hasattr(one, "hf_quantizer")]
    if not others:
        return None
    stored = {name for names in quantizers[0].serialized_names.values() for name in names}
    companions = stored - quantizers[0].serialized_names.keys()  # scales
    sources = [one for one in conversion._original_source_patterns if one.rpartition(".")[2] not in companions]
    return conversion.copy(sources, list(conversion._original_target_patterns), operations=others)


def refuse_unplain(model: Any) -> None:
    """Raise CheckpointError for a model whose weights are not those of its class: quantized, or with adapters."""
    if getattr(model, "hf_quantizer", None) is not None:
        raise CheckpointError("a quantized model cannot be exported; load it unquantized, or use its save_pretrained")
    if has_adapters(model):
        raise CheckpointError("a model with adapters cannot be exported; merge them into the weights first")


def refuse_wrapped(parts: Sequence[nn.Module]) -> None:
    """Raise CheckpointError for a model that PEFT has wrapped: its parameters are not those of the model's class."""
    if any(name_root(part) is not inner_model(part) for part in parts):
        raise CheckpointError(
            "a model with PEFT's adapters cannot be exported; save the adapters with save_pretrained of PEFT's model, "
            "and merge them into the weights on one process with merge_and_unload()"
        )


@attrs.frozen
class Group:
    """Parameters that must be converted together, and the layouts of the tensors that are saved for them, by name."""

    sources: tuple[str, ...]
    saved: Mapping[str, ShapeAndDtype]
    renamed_only: bool = False

    @property
    def nbytes(self) -> int:
        """The number of bytes that are saved."""
        return sum(map(nbytes, self.saved.values()))

    def convert(self, bare: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors to save for *tensors*, the sources by name; *bare* is the skeleton of the model.

        Raises CheckpointError when the conversion gives other names for this group alone than within the whole model.
        """
        if self.renamed_only:
            return dict(zip(self.saved, tensors.values(), strict=True))
        converted: dict[str, Tensor] = revert_weight_conversion(bare, tensors)
        if set(converted) != set(self.saved):
            raise CheckpointError(
                f"transformers saves {sorted(self.sources)} as {sorted(converted)} alone, but as {sorted(self.saved)} "
                "within the model"
            )
        return converted


class _Origins(TorchDispatchMode):
    """Track, by storage, which of the named tensors every tensor is computed from."""

    def __init__(self, named: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._alive: list[Any] = list(named.values())  # the id of a freed storage could be reused by another one
        self._names: dict[int, frozenset[str]] = {}
        for name, tensor in named.items():
            self._names[storage_id(tensor)] = frozenset({name})

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self._alive.append(result)
        names: frozenset[str] = frozenset().union(*(self.of(tensor) for tensor in tensors_in((args, kwargs or {}))))
        for tensor in tensors_in(result):
            self._names[storage_id(tensor)] = self.of(tensor) | names
        return result

    def of(self, tensor: Tensor) -> frozenset[str]:
        return self._names.get(storage_id(tensor), frozenset())


def groups(bare: Any, layouts: Mapping[str, ShapeAndDtype]) -> list[Group]:
    """Return the groups of parameters that must be converted together, in the order of *layouts*."""
    metas = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in layouts.items()}
    with _Origins(metas) as origins:
        saved: dict[str, Tensor] = revert_weight_conversion(bare, dict(metas))
    group_of: dict[str, set[str]] = {name: {name} for name in layouts}
    for tensor in saved.values():
        joined = set().union(*(group_of[name] for name in origins.of(tensor)))
        for name in joined:
            group_of[name] = joined
    found: dict[frozenset[str], dict[str, ShapeAndDtype]] = {frozenset(group): {} for group in group_of.values()}
    for target, tensor in saved.items():
        (source, *_) = origins.of(tensor)
        found[frozenset(group_of[source])][target] = (tuple(tensor.shape), tensor.dtype)
    same = {id(tensor) for tensor in metas.values()} & {id(tensor) for tensor in saved.values()}
    return [
        Group(
            tuple(sorted(sources)),
            made,
            renamed_only=len(sources) == len(made) == 1 and id(metas[next(iter(sources))]) in same,
        )
        for sources, made in found.items()
        if made
    ]
