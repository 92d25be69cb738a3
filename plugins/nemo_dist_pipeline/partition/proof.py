"""Prove, at load, that the stages of a model in sequence compute what the whole model does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_dist.hf_model import has_own_code
from nemo_dist.training.counted_calls import SecondForward
from nemo_dist_pipeline.partition.model_structure import ModelStructure
from nemo_dist_pipeline.partition.own_code import require_exact_code
from nemo_dist_pipeline.partition.skeleton import NO_PIPELINE, Run, forward, skeleton
from nemo_dist_pipeline.partition.stage_model import StageInfo, keep_stage, open_stage, set_hollow_dtype


def require_exact(model: Any, structure: ModelStructure, stages: Sequence[StageInfo]) -> str:
    """Raise ValueError unless every block gets on its stage what it gets in the whole model, bit for bit.

    The output of the last stage must be that of the whole model, too. Runs on stand-ins for blocks and weights; see
    ``skeleton``. Return why the model's own loss, in code of the user's own, is another one; see ``own_code``.
    """
    blocks = {name: model.get_submodule(name) for name in structure.layers}
    first = skeleton(model, blocks)
    keep_stage(first, stages[0], structure, torch.device("cpu"))
    _require_own_initialisation(first)
    _require_equal_stages(model, structure, stages, training=False)
    if not has_own_code(model):
        return ""
    _require_equal_microbatches(model)
    _require_equal_stages(model, structure, stages, training=True)
    return require_exact_code(model, structure, stages)


def _require_equal_stages(model: Any, structure: ModelStructure, stages: Sequence[StageInfo], training: bool) -> None:
    kind = type(model).__name__
    blocks = {name: model.get_submodule(name) for name in structure.layers}
    whole = Run(places=structure.places)
    whole.output = forward(skeleton(model, blocks, training), whole)
    if training and whole.draws.unknown:
        return  # what is drawn cannot be made equal
    hidden: Any = None
    for stage in stages:
        bare = skeleton(model, blocks, training)
        keep_stage(bare, stage, structure, torch.device("cpu"))
        set_hollow_dtype(bare, torch.float32)  # that of all other stand-ins for weights
        open_stage(bare)
        run = Run(places=structure.places)
        bare.pipeline_entry.received = hidden
        try:
            hidden = forward(bare, run)
        except Exception as error:
            raise ValueError(
                f"{kind} does not run with its blocks on several stages ({type(error).__name__}: {error}); "
                f"{NO_PIPELINE}"
            ) from error
        for name in stage.own_blocks:
            for argument, value in whole.given[name].items():
                if not _same(value, run.given.get(name, {}).get(argument)):
                    raise ValueError(
                        f"{kind} gives its block {name} as {argument!r} what comes of weights of other stages, besides "
                        f"hidden states; {NO_PIPELINE}"
                    )
    if not _same(_plain(whole.output), _plain(hidden)):
        raise ValueError(f"{kind} uses weights of other stages again after its blocks; {NO_PIPELINE}")


def _require_equal_microbatches(model: Any) -> None:
    """Raise ValueError where a second forward of *model* is another one: a step has one for each microbatch."""
    where = SecondForward.of(model).where
    if where is not None:
        raise ValueError(
            f"{type(model).__name__} computes or keeps something else in a second forward in training ({where}), and a "
            "pipeline runs its blocks once for each microbatch, where one process runs them once; keep nothing from "
            "one forward for the next, or use pp_size=1 (fsdp2 and tp split it, too)"
        )


def _require_own_initialisation(stage: Any) -> None:
    """Raise ValueError where a module outside of the blocks initialises what is in them; *stage* lacks some of them."""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            stage.initialize_weights()
    except Exception as error:
        raise ValueError(
            f"{type(stage).__name__} initialises its blocks from outside of them ({type(error).__name__}: {error}), so "
            f"a stage without some of them cannot be loaded; {NO_PIPELINE}"
        ) from error


def _plain(output: Any) -> Any:
    return dict(output) if isinstance(output, Mapping) else output


def _same(one: Any, other: Any) -> bool:
    """Whether two values are equal, bit for bit; other objects than containers, tensors and numbers are, by type."""
    if isinstance(one, Tensor):
        same = isinstance(other, Tensor) and one.shape == other.shape and one.dtype == other.dtype
        return same and bool(torch.equal(one.nan_to_num(), other.nan_to_num()))
    if isinstance(one, Mapping):
        return isinstance(other, Mapping) and one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, tuple | list):
        return type(one) is type(other) and len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, bool | int | float | str | type(None)):
        return bool(one == other)
    return type(one) is type(other)
