"""Split a model on the meta device into this rank's stages, and wrap them, once loaded, in an AutoPipeline."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from nemo_dist.hf_model import inner_model
from nemo_dist.mesh.store_consensus import report
from nemo_dist_pipeline.partition.model_structure import ModelStructure
from nemo_dist_pipeline.partition.proof import require_exact
from nemo_dist_pipeline.partition.stage_model import keep_stage, open_stage, stages_of
from nemo_dist_pipeline.runtime.auto_pipeline import AutoPipeline
from nemo_dist_pipeline.runtime.tied_embedding import TiedWeight

if TYPE_CHECKING:
    from nemo_dist.mesh.mesh_context import MeshContext
    from nemo_dist_pipeline.config import PipelineConfig
    from nemo_dist_pipeline.schedule.stage_placement import StagePlacement

_NEEDS_LOSS = "_nemo_dist_needs_loss"  # in the model's __dict__


def split(
    parts: list[nn.Module], rank: int, device: torch.device, placement: StagePlacement, config: PipelineConfig
) -> None:
    """Edit the one model in *parts* into the first stage of pipeline *rank*, and append the others.

    Raises ValueError for a model that cannot be cut, or not as *config* asks.
    """
    model: Any = parts[0]
    if changed := [name or type(model).__name__ for name, module in model.named_modules() if "forward" in vars(module)]:
        raise ValueError(
            f"{', '.join(changed)} have a forward of their own beside that of their class, which copies for further "
            "stages would share; write it into a class, or use pp_size=1. Where a plugin that acts before the pipeline "
            "set it, give that a stage after Stage.SPLIT"
        )
    structure = ModelStructure.of(model)
    division = division_of(model, structure, placement, config)
    stages = stages_of(structure, division)
    loss_problem = require_exact(model, structure, stages)
    own = [stages[index] for index in placement.stage_ids(rank, len(division))]
    parts += [copy.deepcopy(model) for _ in own[1:]]
    for part, stage in zip(parts, own, strict=True):
        keep_stage(part, stage, structure, device)
        vars(part)[_NEEDS_LOSS] = loss_problem


def division_of(
    model: Any, structure: ModelStructure, placement: StagePlacement, config: PipelineConfig
) -> tuple[tuple[str, ...], ...]:
    """Return the names of the modules of each stage, as *config* asks."""
    if config.parts is not None:
        return structure.checked(model, config.parts)
    stages = placement.stage_count(config, len(structure.layers)) or 0
    return structure.divide(model, stages, by_count=config.layers_per_stage is not None)


def present(
    parts: list[nn.Module], mesh: MeshContext, placement: StagePlacement, config: PipelineConfig
) -> AutoPipeline:
    """Return the pipeline of the loaded *parts*; every pipeline rank calls it."""
    report("tying the embedding", _tie_problem(parts))
    for part in parts[1:]:
        part.train(parts[0].training)
    for part in parts:
        open_stage(inner_model(part))
    group = mesh["pp"].get_group()
    return AutoPipeline(
        parts=parts,
        config=config,
        placement=placement,
        group=group,
        device=mesh.device,
        cp_size=mesh.size("cp"),
        tied=_tied_weight(parts, placement, group),
        needs_loss=vars(inner_model(parts[0]))[_NEEDS_LOSS],
    )


def _tie_problem(parts: list[nn.Module]) -> Exception | None:
    """Return an error when a checkpoint has two different tensors for a weight that the config ties."""
    for part in parts:
        stage: Any = part.pipeline_stage
        if stage.tied and stage.is_last:
            head, embedding = (part.get_parameter(name) for name in stage.tied)
            if head is not embedding:
                return ValueError(
                    f"the config ties {stage.tied[0]} to {stage.tied[1]}, but the checkpoint holds different tensors "
                    "for them; set tie_word_embeddings=False to train both"
                )
    return None


def _tied_weight(parts: list[nn.Module], placement: StagePlacement, group: dist.ProcessGroup) -> TiedWeight | None:
    stages: list[Any] = [part.pipeline_stage for part in parts]
    if stages[0].tied is None:
        return None
    ends = sorted(
        ((stage, part) for stage, part in zip(stages, parts, strict=True) if stage.is_first or stage.is_last),
        key=lambda end: end[0].index,
    )
    replicas = tuple(part.get_parameter(stage.tied[1]) for stage, part in ends)
    if not replicas or not replicas[0].requires_grad:
        return None
    other = None if len(ends) == 2 else (stages[0].count - 1 if ends[0][0].is_first else 0)
    peer = None if other is None else dist.get_global_rank(group, placement.rank_of(other, stages[0].count))
    return TiedWeight(replicas=replicas, counted=ends[0][0].is_first, peer=peer, group=group)
