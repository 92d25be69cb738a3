"""Pipeline parallelism: stages of a transformers model on different ranks, run by torch's pipelining schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import attrs

from nemo_dist import MeshPlan, Plugin, RuntimePart, Stage, hookimpl
from nemo_dist.options import boolean, integer, one_of, optional, options
from nemo_dist_pipeline.placement import Placement
from nemo_dist_pipeline.schedules import SCHEDULES, Schedule, named, stage_ids_this_rank, virtual_stages

if TYPE_CHECKING:
    from torch import nn

    from nemo_dist.context import MeshContext
    from nemo_dist_pipeline.pipeline import AutoPipeline

__all__ = [
    "SCHEDULES",
    "AutoPipeline",
    "Pipeline",
    "PipelineConfig",
    "Schedule",
    "named",
    "stage_ids_this_rank",
    "virtual_stages",
]

_DTYPES = ("float32", "bfloat16", "float16", "float64")


def _schedule(instance: Any, attribute: Any, value: Any) -> None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"PipelineConfig.{attribute.name} must be a string (got {value!r})")


def _path(value: Any) -> Any:
    return value if value is None or isinstance(value, str) else str(value)


def _dtype_name(value: Any) -> Any:
    """Return ``"bfloat16"`` for ``"bf16"``, ``"torch.bfloat16"`` and ``torch.bfloat16``."""
    short = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}
    name = str(value).removeprefix("torch.")
    return None if value is None else short.get(name, name)


def _parts(value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, str) or any(isinstance(part, str) for part in value):
        raise TypeError(
            f"module_fqns_per_model_part must be a list with a list of module names for every stage (got {value!r})"
        )
    return tuple(tuple(part) for part in value)


def _function_name(value: Any) -> str:
    """Write a function without its address, so that ranks which build the same setup describe it alike."""
    return f"{value.__module__}.{value.__qualname__}" if hasattr(value, "__qualname__") else type(value).__name__


def _callable(instance: Any, attribute: Any, value: Any) -> None:
    if value is not None and not callable(value):
        raise TypeError(f"PipelineConfig.loss_fn must be a function of logits and labels (got {value!r})")


@options(plugin="pipeline")
class PipelineConfig:
    """Options of pipeline parallelism, under NeMo's names.

    ``pp_schedule``: the name of a torch schedule, however it is spelled ("1f1b", "interleaved_1f1b", "zero_bubble" for
    InterleavedZeroBubble, "zbv" for ZBVZeroBubble, ...); None is "1f1b". ``pp_schedule_csv``: a file with a schedule of
    your own in its place, a line per rank. ``pp_microbatch_size``: rows in a microbatch. ``pp_batch_size``: rows that a
    data-parallel rank passes at once; smaller batches are filled up with rows that do not count, larger ones refused;
    None takes every batch as it comes. ``layers_per_stage``: makes as many stages as layers divided by it, rounded to a
    multiple of the ranks as ``round_virtual_stages_to_pp_multiple`` says ("up" or "down"), and deals layers by count;
    None makes one stage per rank, two for looped and V schedules, balanced by bytes and FLOPs.
    ``module_fqns_per_model_part``: the modules of every stage by full name, in place of that. ``loss_fn``: a function
    of logits and labels that returns the mean over the labels that are not -100, as the model's own loss does; None is
    the model's own. ``dtype``: of the hidden states between stages; None is what the first stage makes.
    ``pp_seq_len``: the length of every sequence, others are refused; None takes any. ``scale_grads_in_schedule``: sum
    gradients over microbatches and divide once at the end, not in the loss; the gradients come out the same.
    """

    pp_schedule: str | None = attrs.field(default=None, validator=_schedule)
    pp_schedule_csv: str | None = attrs.field(default=None, converter=_path)
    pp_microbatch_size: int = attrs.field(default=1, validator=integer(at_least=1))
    pp_batch_size: int | None = attrs.field(default=None, validator=optional(integer(at_least=1)))
    layers_per_stage: int | None = attrs.field(default=None, validator=optional(integer(at_least=1)))
    module_fqns_per_model_part: Iterable[Iterable[str]] | None = attrs.field(default=None, converter=_parts)
    round_virtual_stages_to_pp_multiple: str | None = attrs.field(
        default=None, validator=optional(one_of(("up", "down")))
    )
    scale_grads_in_schedule: bool = attrs.field(default=False, validator=boolean)
    loss_fn: Callable[[Any, Any], Any] | None = attrs.field(default=None, validator=_callable, repr=_function_name)
    dtype: Any = attrs.field(default=None, converter=_dtype_name, validator=optional(one_of(_DTYPES)))
    pp_seq_len: int | None = attrs.field(default=None, validator=optional(integer(at_least=1)))

    def __attrs_post_init__(self) -> None:
        if self.pp_schedule is not None:
            named(self.pp_schedule)

    @property
    def parts(self) -> tuple[tuple[str, ...], ...] | None:
        """``module_fqns_per_model_part`` as tuples."""
        given: Any = self.module_fqns_per_model_part
        return given  # type: ignore[no-any-return]


@attrs.frozen(eq=False)
class Pipeline:
    """Split the model into stages over the ranks of ``pp``; train them with a schedule of microbatches."""

    name: ClassVar[str] = "pipeline"
    config_type: ClassVar[type] = PipelineConfig
    stage: ClassVar[int] = Stage.SPLIT
    axes: ClassVar[frozenset[str]] = frozenset({"pp"})
    composes_with: ClassVar[frozenset[str]] = frozenset()

    config: PipelineConfig = attrs.field(factory=PipelineConfig)

    @hookimpl
    def validate(self, plan: MeshPlan, plugins: tuple[Plugin, ...]) -> list[str]:
        size = plan.size("pp")
        if size == 1:
            return ["plugin 'pipeline' was selected, but pp_size is 1; set pp_size > 1 or leave it out"]
        placement, problems = Placement.of(self.config, size)
        if problems:
            return problems
        return [
            *self._contradictions(),
            *self._count_problems(placement),
            *self._stage_problems(placement),
            *_strategy_problems(placement, plugins),
        ]

    def _contradictions(self) -> list[str]:
        config = self.config
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
            problems.append(
                "round_virtual_stages_to_pp_multiple rounds what layers_per_stage makes, which is not given"
            )
        return problems

    def _count_problems(self, placement: Placement) -> list[str]:
        rows, size = self.config.pp_batch_size, self.config.pp_microbatch_size
        if rows is None:
            return []
        if rows % size:
            below = rows // size * size
            return [
                f"pp_batch_size {rows} is not divisible by pp_microbatch_size {size}; use "
                f"{f'{below} or ' if below else ''}{below + size}"
            ]
        problem = placement.microbatch_problem(rows // size)
        ways = f"pp_batch_size {rows} / pp_microbatch_size {size}"
        return [f"{problem}, which is {ways}; change one of them or the schedule"] if problem else []

    def _stage_problems(self, placement: Placement) -> list[str]:
        parts = self.config.parts
        if parts is None:
            return []
        given, size, where = len(parts), placement.pp_size, "module_fqns_per_model_part"
        names = [name for part in parts for name in part]
        # A module without parameters may stand in every stage, as NeMo's lists have it; which do, the model knows.
        twice = sorted({name for name in names if 1 < names.count(name) < given})
        problems = [f"{where} names {name!r} more than once; a module belongs to one stage" for name in twice]
        if placement.stages not in (None, given):
            problems.append(f"{where} has {given} stages, but pp_schedule_csv {placement.stages}")
        elif given % size:
            problems.append(f"{where} has {given} stages, which is no multiple of the {size} pipeline ranks")
        elif placement.schedule and (problem := placement.schedule.stages_problem(given // size)):
            problems.append(f"{where} has {given} stages on {size} ranks: {problem}")
        return problems

    @hookimpl
    def explain(self, plan: MeshPlan) -> str:
        size = plan.size("pp")
        placement, _ = Placement.of(self.config, size)
        rows, step = self.config.pp_batch_size, self.config.pp_microbatch_size
        if placement.schedule is None:
            from nemo_dist_pipeline.timeline import play

            count, bubble = placement.microbatches, play(placement.order).bubble
            stages = f"{placement.stages} stages"
        else:
            per_rank = len(self.config.parts) // size if self.config.parts else placement.schedule.per_rank
            count = (rows or 4 * size * step) // step
            bubble = placement.schedule.bubble(size, per_rank, count)
            stages = f"{size * per_rank} stages" if self.config.layers_per_stage is None else "stages"
        return (
            f"pipeline: {stages} on {size} ranks, schedule {placement.name}; with {count} microbatches of {step} rows "
            f"ranks idle {bubble:.1%} of the time in theory; hidden states go to the next stage, their gradients back"
        )

    @hookimpl
    def shard(self, parts: list[nn.Module], mesh: MeshContext, plan: MeshPlan) -> None:
        from nemo_dist_pipeline.split import split

        split(parts, mesh.rank("pp"), Placement.of(self.config, plan.size("pp"))[0], self.config)

    @hookimpl
    def present(self, parts: list[nn.Module], mesh: MeshContext, plan: MeshPlan) -> AutoPipeline:
        from nemo_dist_pipeline.split import present

        return present(parts, mesh, Placement.of(self.config, plan.size("pp"))[0], self.config)

    @hookimpl
    def runtime(self, model: Any) -> RuntimePart:
        return RuntimePart(
            engine=model.run,
            survey=model.survey,
            norm_axes=("pp",),
            norm_skip=model.tied.counted_elsewhere if model.tied else (),
        )


def _strategy_problems(placement: Placement, plugins: tuple[Plugin, ...]) -> list[str]:
    """Refuse options of other plugins, by their names in any config, that come out wrong or nobody has proven."""

    def given(option: str, which: Iterable[Plugin] = plugins) -> list[Any]:
        return [value for plugin in which if (value := getattr(plugin.config, option, None)) is not None]

    problems = []
    if placement.splits:
        reason = (
            f"under schedule {placement.name!r}, whose backward is in two parts; use '1F1B' or 'Interleaved1F1B', or"
        )
        if any(given("reshard_after_forward")):
            problems.append(f"reshard_after_forward loses gradients {reason} leave it out")
        if any(given("sequence_parallel")):
            problems.append(f"sequence_parallel does not run {reason} leave it out")
        if "selective" in given("mode", [plugin for plugin in plugins if plugin.stage == Stage.RECOMPUTE]):
            problems.append(f"activation_checkpointing='selective' does not run {reason} take 'full'")
    if any(given("enable_compile")):
        problems.append("enable_compile is not proven with a pipeline; leave it out, or set pp_size to 1")
    if given("offload_policy"):
        problems.append("offload_policy is not proven with a pipeline; leave it out, or set pp_size to 1")
    if False in given("defer_fsdp_grad_sync"):
        problems.append(
            "defer_fsdp_grad_sync=False asks to reduce gradients in every backward, but a pipeline reduces them once, "
            "after its last microbatch; leave it out"
        )
    return problems


def __getattr__(name: str) -> Any:
    if name == "AutoPipeline":
        from nemo_dist_pipeline.pipeline import AutoPipeline

        return AutoPipeline
    raise AttributeError(f"module 'nemo_dist_pipeline' has no attribute {name!r}")
