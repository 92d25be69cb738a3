"""Say what a tensor-parallel rank holds, by the plan that the forwards follow; no process group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_dist.errors import TopologyError
from nemo_dist.plugin.memory_estimate import RankShare, once_per_model
from nemo_dist_tensor.apply import Parallelizer
from nemo_dist_tensor.collectives import Peers
from nemo_dist_tensor.structure import completed
from nemo_dist_tensor.tp_plan import match, problems


def hold(ranks: list[RankShare], model: Any, size: int, plan: Mapping[str, str], sequence: bool, experts: bool) -> None:
    """Cut the parameters of *ranks* over *size* tensor-parallel ranks; raise TopologyError with what does not fit."""
    for name, (dim, parts) in cuts(model, size, tuple(plan.items()), sequence, experts).items():
        for rank in ranks:
            rank.cut(name, dim, parts)


@once_per_model
def cuts(
    model: Any, size: int, plan: tuple[tuple[str, str], ...], sequence: bool, experts: bool
) -> dict[str, tuple[int, int]]:
    """Return, by name, the dim along which a parameter of *model* is cut, and into how many parts.

    ``sequence``: the tokens are cut, too. ``experts``: those are cut here.
    """
    rules, found = completed(model, match(model, dict(plan), skip_experts=not experts), size, experts, sequence)
    if found := [*found, *problems(model, rules)]:
        raise TopologyError(found)
    peers = Peers(mesh=None, group=None, size=size, rank=0)  # type: ignore[arg-type]  # only the numbers are read
    work = Parallelizer(model, rules, peers, sequence)
    if found := work.problems():
        raise TopologyError(found)
    return {
        name: (placement.dim, size)  # type: ignore[attr-defined]  # every style shards or leaves whole
        for name, placement in work.placements().items()
        if placement is not None
    }
