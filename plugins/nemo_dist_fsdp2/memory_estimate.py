"""Estimate what a rank holds under sharded data parallelism, by the groups that ``sharding`` makes."""

from __future__ import annotations

from itertools import chain, pairwise
from typing import Any

import attrs

from nemo_dist import MeshPlan, Role, hf_model
from nemo_dist.plugin.comm_estimate import bytes_of
from nemo_dist.plugin.memory_estimate import RankShare, once_per_model
from nemo_dist_fsdp2.config import FSDP2Config
from nemo_dist_fsdp2.sharding import embeddings, untied


@attrs.frozen(kw_only=True)
class Groups:
    """The names of the parameters of a model that are gathered together, group by group, in the order of the forward.

    ``passing``: those of a block or an embedding, which may be freed between uses. ``staying``: those that stay whole
    from their first use to the last: the end of the forward, and what is tied or in no other group.
    """

    passing: tuple[tuple[str, ...], ...]
    staying: tuple[str, ...]


@once_per_model
def groups(model: Any) -> Groups:
    """Return the groups of parameters of *model*."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def inside(module: Any) -> tuple[str, ...]:
        return tuple(names[id(parameter)] for parameter in module.parameters())

    passing = [inside(one) for one in chain(*untied(model, embeddings(model), hf_model.blocks(model).values()))]
    apart = {name for group in passing for name in group}
    return Groups(passing=tuple(passing), staying=tuple(name for name in names.values() if name not in apart))


def hold(
    ranks: list[RankShare], plan: MeshPlan, config: FSDP2Config, dtypes: tuple[str | None, str | None], model: Any
) -> None:
    """Shard what *ranks* keep, and add what is gathered at once, and gradients that wait to be reduced."""
    found, pipeline = groups(model), plan.splitting(Role.LAYERS) > 1
    reshard = config.reshard_after_forward
    frees = not pipeline if reshard is None else bool(reshard)
    compute, reduction = (None if name is None else bytes_of(name) for name in dtypes)
    shards = plan.size("dp_shard_cp")
    for rank in ranks:
        for name in rank.stored:
            if name not in rank.overridden:
                rank.shard(name, 0, shards)
        sizes = [rank.computed_bytes(group, compute) for group in found.passing]
        most = max((one + other for one, other in pairwise([0, *sizes])), default=0)  # a group, and the next one
        rank.bytes["gathered parameters"] = rank.computed_bytes(found.staying, compute) + (
            most if frees else sum(sizes)
        )
        largest = max(map(rank.trained, found.passing), key=rank.computed_bytes, default=[])
        waits = (pipeline or rank.forwards > 1) and config.defer_fsdp_grad_sync
        waiting = rank.computed if waits else (*largest, *found.staying)
        rank.bytes["gradients before they are reduced"] = rank.computed_bytes(
            rank.trained(waiting), reduction or compute
        )
