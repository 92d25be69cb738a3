"""Change the modules of stages in place, as adapters of PEFT do, as if it were done to the whole model at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from nemo_dist.hf_model import inner_model, input_embedding
from nemo_dist.mesh.store_consensus import reported
from nemo_dist_pipeline.partition.stage_model import StageInfo
from nemo_dist_pipeline.runtime.forward_only import broadcast_tensors
from nemo_dist_pipeline.schedule.stage_placement import StagePlacement


def replace_parts(
    parts: list[nn.Module],
    placement: StagePlacement,
    group: dist.ProcessGroup,
    device: torch.device,
    make: Callable[[nn.Module], nn.Module],
) -> None:
    """Put what *make* makes of each of *parts* in its place; see ``AutoPipeline.replace_parts``."""
    stages: list[Any] = [part.pipeline_stage for part in parts]
    ranks, count = dist.get_process_group_ranks(group), stages[0].count
    places = {stage.index: place for place, stage in enumerate(stages)}
    for index in range(count):
        place, drawn = places.get(index), {}
        with reported("adding adapters", ranks):
            if place is not None:
                parts[place] = _made(parts[place], make)
                drawn = {"state": torch.get_rng_state().to(device)}
        # All ranks of this pipeline take part; the one with the stage says where its generator is.
        state = broadcast_tensors(drawn, placement.rank_of(index, count), group, device)["state"]
        torch.set_rng_state(state.cpu())


def _made(part: nn.Module, make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    model: Any = inner_model(part)
    stage: StageInfo = model.pipeline_stage
    tied = {name: model.get_submodule(name) for name in (weight.rpartition(".")[0] for weight in stage.tied or ())}
    with _only_its_own(model, stage):
        try:
            made = make(part)
        except ValueError as error:
            raise ValueError(
                f"stage {stage.index} of {stage.count} ({', '.join(stage.modules)}) cannot be adapted: {error}; under "
                "pp every stage needs some of the modules, so target those of blocks, beside others"
            ) from error
    for name, module in tied.items():
        if model.get_submodule(name) is not module:
            raise ValueError(
                f"{name} shares its weight with a module of another stage, so adapters cannot stand beside it under "
                "pp; target other modules"
            )
    return made


@contextmanager
def _only_its_own(model: Any, stage: StageInfo) -> Iterator[None]:
    """Within the context, the modules of other stages, which *model* keeps without weights, are not in it.

    PEFT asks the embedding for its parameters, to find what is tied to it: that of another stage has none.
    """
    others = {name for names in stage.division for name in names} - {*stage.modules, *stage.blocks}
    hidden = {name: model.get_submodule(name) for name in others}
    for name in hidden:
        _put(model, name, None)  # which keeps their place in the order of modules
    asked = vars(model)
    if input_embedding(model) is None:
        asked["get_input_embeddings"] = nn.Module
    try:
        yield
    finally:
        asked.pop("get_input_embeddings", None)
        for name, module in hidden.items():
            _put(model, name, module)


def _put(model: nn.Module, name: str, module: nn.Module | None) -> None:
    owner, _, own = name.rpartition(".")
    setattr(model.get_submodule(owner), own, module)
