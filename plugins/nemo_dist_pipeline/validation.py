"""Find options that contradict each other or those of other plugins, before there is a model; no torch."""

from __future__ import annotations

from nemo_dist import Plugin
from nemo_dist.plugin.protocol import asked_for
from nemo_dist_pipeline.config import PipelineConfig
from nemo_dist_pipeline.schedule.stage_placement import StagePlacement


def option_problems(config: PipelineConfig, placement: StagePlacement, plugins: tuple[Plugin, ...]) -> list[str]:
    """Say what in *config* does not fit itself, the *placement* that it asks for, or the *plugins* beside it."""
    return [
        *_exclusive_options(config),
        *_batch_size(config, placement),
        *_module_lists(config, placement),
        *_other_plugins(placement, plugins),
    ]


def _exclusive_options(config: PipelineConfig) -> list[str]:
    pairs = (
        ("pp_schedule", "pp_schedule_csv", "the file is the schedule"),
        ("layers_per_stage", "module_fqns_per_model_part", "the list says what every stage takes"),
        ("layers_per_stage", "pp_schedule_csv", "the file says how many stages there are"),
    )
    problems = [
        f"{one} and {other} are both given; leave one out, as {why}"
        for one, other, why in pairs
        if getattr(config, one) is not None and getattr(config, other) is not None
    ]
    if config.round_virtual_stages_to_pp_multiple is not None and config.layers_per_stage is None:
        problems.append("round_virtual_stages_to_pp_multiple rounds what layers_per_stage makes, which is not given")
    return problems


def _batch_size(config: PipelineConfig, placement: StagePlacement) -> list[str]:
    rows, size = config.pp_batch_size, config.pp_microbatch_size
    if rows is None:
        return []
    if rows % size:
        below = rows // size * size
        return [
            f"pp_batch_size {rows} is not divisible by pp_microbatch_size {size}; use "
            f"{f'{below} or ' if below else ''}{below + size}"
        ]
    problem = placement.microbatch_problem(rows // size)
    division = f"pp_batch_size {rows} / pp_microbatch_size {size}"
    return [f"{problem}, which is {division}; change one of them or the schedule"] if problem else []


def _module_lists(config: PipelineConfig, placement: StagePlacement) -> list[str]:
    parts = config.parts
    if parts is None:
        return []
    given, size, where = len(parts), placement.pp_size, "module_fqns_per_model_part"
    names = [name for part in parts for name in part]
    # NeMo's lists name modules without parameters for every stage; only the model tells which those are.
    twice = sorted({name for name in names if 1 < names.count(name) < given})
    problems = [f"{where} names {name!r} more than once; a module belongs to one stage" for name in twice]
    if placement.stages not in (None, given):
        problems.append(f"{where} has {given} stages, but pp_schedule_csv {placement.stages}")
    elif given % size:
        problems.append(f"{where} has {given} stages, which is no multiple of the {size} pipeline ranks")
    elif placement.schedule and (problem := placement.schedule.stages_problem(given // size)):
        problems.append(f"{where} has {given} stages on {size} ranks: {problem}")
    return problems


def _other_plugins(placement: StagePlacement, plugins: tuple[Plugin, ...]) -> list[str]:
    """Refuse options of other plugins, found by name in any config, that give wrong results or are not proven here."""
    problems = []
    if placement.splits:
        reason = (
            f"under schedule {placement.name!r}, whose backward is in two parts; use '1F1B' or 'Interleaved1F1B', or"
        )
        if option := asked_for(plugins, "reshard_after_forward"):
            problems.append(f"{option} loses gradients {reason} leave it out")
        if option := asked_for(plugins, "activation_checkpointing:selective"):
            problems.append(f"{option} does not run {reason} take 'full'")
    for feature in ("compile", "offload"):
        if option := asked_for(plugins, feature):
            problems.append(f"{option} is not proven with a pipeline; leave it out, or set pp_size to 1")
    if option := asked_for(plugins, "reduce_every_backward"):
        problems.append(
            f"{option} asks to reduce gradients in every backward, but a pipeline reduces them once, "
            "after its last microbatch; leave it out"
        )
    return problems
