"""Ask the plugins' ``memory`` hooks what ranks hold, for a search and for a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from nemo_dist.errors import PluginError
from nemo_dist.hf_model import block_names, class_name
from nemo_dist.planning.mesh_plan import MeshPlan
from nemo_dist.plugin.comm_estimate import ModelFacts
from nemo_dist.plugin.hook_caller import PluginCalls
from nemo_dist.plugin.memory_estimate import RankShare
from nemo_dist.plugin.protocol import Plugin
from nemo_dist.plugin.step_schedule import StepSchedule
from nemo_dist.setup.composition import Composition

NOTES = (
    "Parameters, gradients and the state of AdamW are those of the fullest rank, to the byte.",
    "Of activations only the input of every block is counted, which is what full recomputation keeps, for the "
    "microbatches that a stage holds at once; nemo-dist search counts all of them.",
    "Not counted: buffers of collectives, and what the allocator keeps.",
)


def divide(
    whole: RankShare, calls: PluginCalls, strategy: Plugin | None, plan: MeshPlan, facts: ModelFacts, model: Any
) -> list[RankShare]:
    """Return what ranks hold of the *whole*, as the plugins say; raise what they refuse with.

    Raises PluginError for a *strategy* that has no ``memory`` hook.
    """
    ranks = [whole]
    answered = [name for name, _ in calls.each("memory", ranks=ranks, plan=plan, facts=facts, model=model)]
    if strategy is not None and strategy.name not in answered:
        raise PluginError(f"strategy {strategy.name!r} has no memory hook, so what it holds is not known")
    return ranks


def memory_bars(
    setup: Composition,
    model: Any,
    added: Mapping[str, Any],
    facts: ModelFacts | None,
    schedule: StepSchedule | None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return what a rank holds at each coordinate of the axis that splits the layers, as values for JSON, and notes.

    *added*: the parameters of adapters of *model*. There is one bar without such an axis. There is none without a
    model, and none where a plugin cannot say what it holds, which is then the note.
    """
    if facts is None:
        return [], []
    rows = facts.rows if schedule is None else schedule.rows * schedule.microbatches
    step = attrs.evolve(facts, rows=rows)  # a schedule is drawn with more rows where it needs them
    whole = RankShare.whole(model, rows, facts.length, added)
    try:
        shares = divide(whole, setup.calls, setup.strategy, setup.plan, step, model)
    except (ValueError, PluginError) as refusal:
        return [], [f"No memory is shown: {refusal}"]
    units, head = list(_units(model)), _head(model)
    owners = schedule.owners if schedule is not None else (0,)
    bars = [
        {
            "stages": [stage for stage, owner in enumerate(owners) if owner == place],
            "modules": [unit for unit in units if any(name.startswith(f"{unit}.") for name in share.computed)],
            "held": {**share.held, **_activations(share, head, facts)},
        }
        for place, share in enumerate(shares)
    ]
    return bars, list(NOTES)


def _activations(share: RankShare, head: str | None, facts: ModelFacts) -> dict[str, int]:
    """Return the bytes of the inputs of all blocks, and of the logits, which the parameter *head* makes."""
    tokens = share.rows * share.length
    inputs = sum(len(stage.blocks) * stage.alive for stage in share.stages)
    found = {"block inputs": inputs * tokens * facts.hidden * facts.computed}
    if head is not None and any(stage.last for stage in share.stages):
        found["logits"] = tokens * share.computed[head][0] * facts.computed
    return found


def _head(model: Any) -> str | None:
    """Return the name of the weight of the output head of *model*, which has a row for each word."""
    head = getattr(model.get_output_embeddings(), "weight", None)
    return next((name for name, parameter in model.named_parameters() if parameter is head), None)


def _units(model: Any) -> Iterator[str]:
    """Yield the names of the largest modules of *model* that are blocks, or have no block in them."""
    blocks = {name for name, module in model.named_modules() if class_name(module) in block_names(model)}
    within = {name[:end] for name in blocks for end, letter in enumerate(name) if letter == "."} | {""}
    for name, _ in model.named_modules():
        if name not in within and name.rpartition(".")[0] in within:
            yield name
