"""Pipeline parallelism: stages of a transformers model on different ranks, run by torch's pipelining schedules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import attrs

from nemo_dist import MeshPlan, Plugin, RuntimePart, Stage, hookimpl
from nemo_dist_pipeline.config import PipelineConfig
from nemo_dist_pipeline.schedule.schedules import SCHEDULES, Schedule, named, stage_ids_this_rank, virtual_stages
from nemo_dist_pipeline.schedule.stage_placement import StagePlacement
from nemo_dist_pipeline.validation import option_problems

if TYPE_CHECKING:
    from torch import nn

    from nemo_dist.mesh.mesh_context import MeshContext
    from nemo_dist.plugin.comm_estimate import ModelFacts, Traffic
    from nemo_dist.plugin.memory_estimate import RankShare
    from nemo_dist.plugin.step_schedule import StepSchedule
    from nemo_dist_pipeline.runtime.auto_pipeline import AutoPipeline

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


@attrs.frozen(eq=False)
class Pipeline:
    """Split the model into stages over the ranks of ``pp``; train them with a schedule of microbatches."""

    name: ClassVar[str] = "pipeline"
    config_type: ClassVar[type] = PipelineConfig
    stage: ClassVar[int] = Stage.SPLIT
    axes: ClassVar[frozenset[str]] = frozenset({"pp"})
    composes_with: ClassVar[frozenset[str]] = frozenset({"adapters"})

    config: PipelineConfig = attrs.field(factory=PipelineConfig)

    @hookimpl
    def validate(self, plan: MeshPlan, plugins: tuple[Plugin, ...]) -> list[str]:
        size = plan.size("pp")
        if size == 1:
            return ["plugin 'pipeline' was selected, but pp_size is 1; set pp_size > 1 or leave it out"]
        placement, problems = StagePlacement.of(self.config, size)
        return problems or option_problems(self.config, placement, plugins)

    @hookimpl
    def explain(self, plan: MeshPlan) -> str:
        placement, _ = StagePlacement.of(self.config, plan.size("pp"))
        count = placement.microbatches or self.config.microbatches or 4 * placement.pp_size
        total = placement.stage_count(self.config)
        stages = "stages" if total is None else f"{total} stages"
        return (
            f"pipeline: {stages} on {placement.pp_size} ranks, schedule {placement.name}; with {count} microbatches of "
            f"{self.config.pp_microbatch_size} rows ranks idle {placement.bubble(total, count):.1%} of the time in "
            "theory; hidden states go to the next stage, their gradients back"
        )

    @hookimpl
    def traffic(self, plan: MeshPlan, facts: ModelFacts | None) -> list[Traffic]:
        from nemo_dist_pipeline.comm_estimate import traffic

        return traffic(plan, facts, StagePlacement.of(self.config, plan.size("pp"))[0], self.config)

    @hookimpl
    def schedule(self, plan: MeshPlan, facts: ModelFacts | None, model: nn.Module | None) -> StepSchedule:
        from nemo_dist_pipeline.step_schedule import step_schedule

        return step_schedule(facts, model, StagePlacement.of(self.config, plan.size("pp"))[0], self.config)

    @hookimpl
    def memory(self, ranks: list[RankShare], plan: MeshPlan, facts: ModelFacts, model: nn.Module) -> None:
        from nemo_dist_pipeline.memory_estimate import hold

        hold(ranks, plan, facts, StagePlacement.of(self.config, plan.size("pp"))[0], self.config, model)

    @hookimpl
    def agree(self, plan: MeshPlan) -> Mapping[str, str]:
        order = StagePlacement.of(self.config, plan.size("pp"))[0].order
        return {f"line {number} of pp_schedule_csv": ",".join(map(str, line)) for number, line in enumerate(order, 1)}

    @hookimpl
    def shard(self, parts: list[nn.Module], mesh: MeshContext, plan: MeshPlan) -> None:
        from nemo_dist_pipeline.partition.split import split

        placement = StagePlacement.of(self.config, plan.size("pp"))[0]
        split(parts, mesh.rank("pp"), mesh.device, placement, self.config)

    @hookimpl
    def present(self, parts: list[nn.Module], mesh: MeshContext, plan: MeshPlan) -> AutoPipeline:
        from nemo_dist_pipeline.partition.split import present

        return present(parts, mesh, StagePlacement.of(self.config, plan.size("pp"))[0], self.config)

    @hookimpl
    def runtime(self, model: Any) -> RuntimePart:
        if model.tied:
            model.tied.freeze_together()
        return RuntimePart(
            engine=model.run,
            survey=model.survey,
            measure=model.measure,
            forward=model.forward,
            loss=model.mean_loss,
            needs_loss=model.needs_loss,
            rows=self.config.pp_microbatch_size,
            norm_axes=("pp",),
            norm_skip=model.tied.counted_elsewhere if model.tied else (),
        )


def __getattr__(name: str) -> Any:
    if name == "AutoPipeline":
        from nemo_dist_pipeline.runtime.auto_pipeline import AutoPipeline

        return AutoPipeline
    raise AttributeError(f"module 'nemo_dist_pipeline' has no attribute {name!r}")
