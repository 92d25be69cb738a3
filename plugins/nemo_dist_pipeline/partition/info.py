"""What a rank has of a pipeline."""

from __future__ import annotations

import attrs
from torch import nn

from nemo_dist_pipeline.partition.stage_model import StageInfo


@attrs.frozen(kw_only=True, eq=False)
class PipelineInfo:
    """What this rank has of the pipeline: ``stages`` in order, and the model of each in ``model_parts``."""

    schedule: str
    stages: tuple[StageInfo, ...]
    model_parts: tuple[nn.Module, ...]
    num_stages: int
    pp_rank: int
    pp_size: int

    @property
    def has_first_stage(self) -> bool:
        """Whether this rank has the embedding."""
        return any(stage.is_first for stage in self.stages)

    @property
    def has_last_stage(self) -> bool:
        """Whether this rank has the head, and so the loss and the logits."""
        return any(stage.is_last for stage in self.stages)
