"""Estimate what the ranks of every pipeline stage hold in memory, at least, from the plan and the model's shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from nemo_dist.hf_model import block_names, class_name
from nemo_dist.planning.mesh_plan import MeshPlan, Role
from nemo_dist.plugin.comm_estimate import ModelFacts, stacked_experts
from nemo_dist.plugin.protocol import declared
from nemo_dist.plugin.step_schedule import StepSchedule
from nemo_dist.setup.composition import Composition

NOTES = (
    "Parameters, gradients and AdamW's two moments are divided evenly over the ranks that share them.",
    "Of activations only the input of every block is counted, which is what full recomputation keeps, for the "
    "microbatches that a stage holds at once; without recomputation a block keeps several times as much.",
    "Not counted: parameters while they are gathered, buffers of collectives, and what the allocator keeps.",
)


@attrs.frozen(kw_only=True)
class RankMemory:
    """What a rank at one coordinate of the axis that splits the layers holds, at least.

    ``stages``: the numbers of its stages. ``modules``: the full names of their modules. ``elements``: the parameters
    of these modules, before they are divided. ``held``: bytes on a rank, by what they are.
    """

    stages: tuple[int, ...]
    modules: tuple[str, ...]
    elements: int
    held: Mapping[str, int]


def rank_memory(
    setup: Composition, model: Any, facts: ModelFacts, schedule: StepSchedule | None
) -> tuple[RankMemory, ...]:
    """Return what a rank holds, for each coordinate of the axis that splits the layers; one without such an axis."""
    if schedule is None:
        return (_held(setup, model, facts, schedule, (0,), _whole(model)),)
    coordinates = range(1 + max(schedule.owners))
    stages = [tuple(s for s, owner in enumerate(schedule.owners) if owner == here) for here in coordinates]
    return tuple(
        _held(setup, model, facts, schedule, own, [name for stage in own for name in schedule.modules[stage]])
        for own in stages
    )


def _whole(model: Any) -> list[str]:
    """Return the names of the largest modules of *model* that are blocks, or have no block in them."""
    blocks = {name for name, module in model.named_modules() if class_name(module) in block_names(model)}
    within = {name[:end] for name in blocks for end, letter in enumerate(name) if letter == "."} | {""}
    return [
        name
        for name, module in model.named_modules()
        if name not in within and name.rpartition(".")[0] in within and next(module.parameters(), None) is not None
    ]


def _held(
    setup: Composition,
    model: Any,
    facts: ModelFacts,
    schedule: StepSchedule | None,
    stages: tuple[int, ...],
    modules: list[str],
) -> RankMemory:
    elements = _elements(model, modules)
    stored = {what: _stored(setup, elements, what) * facts.stored for what in _COPIES}
    held = {what: round(_COPIES[what] * amount) for what, amount in stored.items()}
    tokens = (schedule.rows if schedule else facts.rows) * facts.length / setup.plan.size("cp")
    inputs = sum(_blocks(model, schedule, stage) * (schedule.held(stage) if schedule else 1) for stage in stages)
    held["block inputs"] = round(inputs * tokens * facts.hidden * facts.computed)
    head = model.get_output_embeddings()
    if head is not None and (schedule is None or len(schedule.owners) - 1 in stages):
        held["logits"] = round(tokens * head.weight.shape[0] / setup.plan.size("tp") * facts.computed)
    return RankMemory(stages=stages, modules=tuple(modules), elements=sum(elements.values()), held=held)


_COPIES = {"parameters": 1, "gradients": 1, "optimizer state": 2}


def _elements(model: Any, modules: Iterable[str]) -> Counter[bool]:
    """Return the number of elements in the parameters of *modules*, each counted once; by whether it is in experts."""
    counts: Counter[bool] = Counter()
    seen: set[int] = set()
    for name in modules:
        for module in model.get_submodule(name).modules():
            routed = stacked_experts(module) > 0
            for parameter in module.parameters(recurse=False):
                counts[routed] += 0 if id(parameter) in seen else parameter.numel()
                seen.add(id(parameter))
    return counts


def _stored(setup: Composition, elements: Counter[bool], what: str) -> float:
    """Return how many elements of *what* a rank stores: those of experts and of the rest are divided differently."""
    plan, sharded = setup.plan, what in (declared(setup.strategy, "sharded") or ())
    rest = plan.size("tp") * (plan.size("dp_shard_cp") if sharded else 1)
    experts = _experts_divided(plan, setup.parallelism_sizes.ep_size) if setup.parallelism_sizes.ep_size > 1 else rest
    return elements[False] / rest + elements[True] / experts


def _experts_divided(plan: MeshPlan, ep_size: int) -> int:
    """Return over how many ranks the experts of a stage are divided: those of a replica, where ``ep`` fits into it."""
    replica = plan.world_size // plan.splitting(Role.LAYERS) // plan.size("dp_replicate")
    return replica if replica % ep_size == 0 else ep_size


def _blocks(model: Any, schedule: StepSchedule | None, stage: int) -> int:
    """Return how many of the repeated blocks are in *stage*."""
    wanted = block_names(model)
    names = schedule.modules[stage] if schedule else _whole(model)
    return sum(class_name(model.get_submodule(name)) in wanted for name in names)
