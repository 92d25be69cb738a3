"""Say in text what a setup is: its axes, who claims each, what every plugin does, and where this rank stands."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from nemo_dist.traffic import ModelFacts

if TYPE_CHECKING:
    from nemo_dist.compose import DistributedSetup


def explanation(setup: DistributedSetup, model: Any = None, rows: int = 1, length: int | None = None) -> str:
    """Return the explanation of *setup*: a line per axis, per plugin and per kind of collective in a step."""
    plan = setup.plan
    lines = [f"{plan.world_size} ranks, strategy {setup.strategy.name if setup.strategy else 'none'}"]
    for view in (plan.dense, *plan.views):
        lines.append(f"mesh {view.name!r}, outermost axis first:")
        for axis in view.axes:
            lines.append(f"  {axis.name:<12} {axis.size:>6}  {_claimants(setup, axis.name) if axis.size > 1 else '-'}")
    lines.append("plugins, in the order they act on the model:")
    lines += [f"  {line}" for line in setup.calls.explain(plan=plan)]
    sent = [
        line for found in setup.calls.traffic(plan=plan, facts=_facts(setup, model, rows, length)) for line in found
    ]
    if sent:
        lines.append("collectives of a step" + (", with the bytes that one rank sends:" if model is not None else ":"))
        lines += [f"  {line}" for line in sent]
    rank = int(os.environ.get("RANK", "0"))
    if rank < plan.world_size and setup.ranks is None:
        place = ", ".join(f"{name} {index}" for name, index in plan.coordinates(rank).items() if plan.size(name) > 1)
        lines.append(f"rank {rank}: {place or 'alone'}; reads the same batch as ranks {list(plan.batch_ranks(rank))}")
    return "\n".join(lines)


def _claimants(setup: DistributedSetup, axis: str) -> str:
    return ", ".join(plugin.name for plugin in setup.plugins if axis in plugin.axes)


def _facts(setup: DistributedSetup, model: Any, rows: int, length: int | None) -> ModelFacts | None:
    if model is None:
        return None
    return ModelFacts.of(
        model,
        rows,
        length or model.config.get_text_config().max_position_embeddings,
        getattr(setup.strategy, "compute_dtype", None),
        setup.activation_checkpointing == "full",
    )
