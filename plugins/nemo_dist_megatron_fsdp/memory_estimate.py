"""Estimate what a rank holds under Megatron-FSDP, by the buckets that the package makes; no process group."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import attrs
import torch
from megatron_fsdp.distributed_data_parallel_config import DistributedDataParallelConfig
from megatron_fsdp.param_and_grad_buffer import (
    BucketingPolicy,
    _get_parameter_groups,
    build_data_parallel_buffer_index,
)
from torch import Tensor, nn

from nemo_dist.errors import TopologyError
from nemo_dist.plugin.memory_estimate import RankShare, Shape, once_per_model
from nemo_dist_megatron_fsdp.config import MegatronFSDPConfig
from nemo_dist_megatron_fsdp.sharding import dim_problem, unit_classes

_SHARDING = DistributedDataParallelConfig(data_parallel_sharding_strategy="optim")  # one that pads, as 1 to 3 do
_WIDE = 4  # bytes of a number in float32


@attrs.frozen(kw_only=True)
class Bucket:
    """Parameters that are gathered and reduced together: their names, and their numbers with padding.

    ``rows``: what the fullest rank keeps of each. ``unit``: of which block it is; None for one that stays gathered, as
    that of the embedding.
    """

    unit: int | None
    numbers: int
    rows: dict[str, Shape]
    itemsize: int


def hold(ranks: list[RankShare], shards: int, tp: int, config: MegatronFSDPConfig, model: Any) -> None:
    """Shard what *ranks* keep; add what is whole, gathered, or kept twice, and gradients that wait to be reduced."""
    for rank in ranks:
        shapes = tuple(rank.computed.items())
        _refuse_uneven(model, rank, tp)
        found = buckets(model, shapes, shards, config.megatron_fsdp_unit_modules)
        rank.stored = {name: shape for bucket in found for name, shape in bucket.rows.items()}
        narrow = any(bucket.itemsize != _WIDE for bucket in found)
        main = narrow and config.preserve_fp32_weights  # float32 weights, which the optimizer steps
        if main:
            rank.itemsize = dict.fromkeys(rank.itemsize, _WIDE)
        level = config.zero_dp_strategy
        weights = _bytes(found, shards if level == 3 else 1)
        gradients = _bytes(found, shards if level > 1 else 1, _WIDE if main else None)
        rank.bytes["gathered parameters"] = (
            weights - (0 if main else rank.stored_bytes) + (_gathered(found) if level == 3 else 0)
        )
        reduced = _WIDE if config.grad_reduce_in_fp32 else None
        waiting = max(_units(found, reduced), default=0) if level > 1 else 0
        rank.bytes["gradients before they are reduced"] = gradients - rank.gradient_bytes + waiting


def _refuse_uneven(model: Any, rank: RankShare, tp: int) -> None:
    """Raise TopologyError with the parameters that the package cannot shard, as a load does."""
    found = []
    for name, parameter in model.named_parameters():
        if name in rank.computed:
            cut = [dim for dim, size in enumerate(rank.computed[name]) if size != parameter.shape[dim]]
            found += dim_problem(name, tuple(parameter.shape), cut[0] if cut else None, tp)
    if found:
        raise TopologyError(found)


@once_per_model
def buckets(
    model: Any, shapes: tuple[tuple[str, Shape], ...], shards: int, units: tuple[str, ...] | None
) -> tuple[Bucket, ...]:
    """Return the buckets of *model* with parameters of these *shapes*, for *shards* ranks."""
    cut = _with_shapes(model, dict(shapes))
    policy = BucketingPolicy(
        suggested_bucket_size=None,
        fsdp_unit_modules=unit_classes(cut, units),
        data_parallel_sharding_strategy=_SHARDING.data_parallel_sharding_strategy,
    )
    groups, _, _ = _get_parameter_groups(cut, policy, {})
    names = {id(parameter): name for name, parameter in cut.named_parameters()}
    sizes = [_sizes(group, shards) for group in groups]
    held = torch.stack([part for _, parts in sizes for part in parts])
    fullest = int(held.sum(0).argmax())  # buckets have gaps, so that is not always the first rank
    return tuple(
        Bucket(
            unit=group.fsdp_unit_id,
            numbers=numbers,
            rows={
                names[id(parameter)]: (int(part[fullest]) // parameter.shape[1:].numel(), *parameter.shape[1:])
                for parameter, part in zip(group.params, parts, strict=True)
            },
            itemsize=group.params[0].element_size(),
        )
        for group, (numbers, parts) in zip(groups, sizes, strict=True)
    )


def _with_shapes(model: nn.Module, shapes: dict[str, Shape]) -> nn.Module:
    """Return a copy of *model*, on meta, with parameters of other *shapes*."""
    made: dict[int, Any] = {
        id(parameter): nn.Parameter(torch.empty(shapes[name], dtype=parameter.dtype, device="meta"))
        for name, parameter in model.named_parameters()
    }
    return copy.deepcopy(model, memo=made)


def _sizes(group: Any, shards: int) -> tuple[int, list[Tensor]]:
    """Return the numbers in the bucket of *group*, and for each of its parameters those that every rank holds."""
    shapes = [parameter.shape for parameter in group.params]
    items, bucket, _ = build_data_parallel_buffer_index(
        shapes, 0, shards, True, _SHARDING, chunk_size_factor=group.chunk_size_factor
    )
    shard: int = bucket.size // shards
    starts = torch.arange(shards) * shard

    def before(position: int) -> Tensor:
        return (position - starts).clamp(0, shard)

    found = [items[index] for index in range(len(shapes))]
    return bucket.size, [before(item.global_data_index + item.size) - before(item.global_data_index) for item in found]


def _bytes(found: tuple[Bucket, ...], shards: int, itemsize: int | None = None) -> int:
    return sum(bucket.numbers // shards * (itemsize or bucket.itemsize) for bucket in found)


def _units(found: tuple[Bucket, ...], itemsize: int | None = None) -> list[int]:
    """Return the bytes of every unit when it is whole, in the order of the forward."""
    sizes: dict[int, int] = {}
    for bucket in found:
        if bucket.unit is not None:
            whole = bucket.numbers * (itemsize or bucket.itemsize)
            sizes[bucket.unit] = sizes.get(bucket.unit, 0) + whole
    return list(sizes.values())


def _gathered(found: tuple[Bucket, ...]) -> int:
    """Return the bytes that are whole at once: what is in no unit, and the two largest neighbours of the units."""
    staying = _bytes(tuple(bucket for bucket in found if bucket.unit is None), 1)
    return staying + max((one + other for one, other in pairwise([0, *_units(found)])), default=0)
