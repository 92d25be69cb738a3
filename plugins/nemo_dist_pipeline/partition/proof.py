"""Prove, at load, that the stages of a model in sequence compute what the whole model does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_dist.hf_model import has_own_code
from nemo_dist.training.counted_calls import SecondForward
from nemo_dist.training.rehearsal import Rehearsal, first_difference
from nemo_dist_pipeline.partition.model_structure import ModelStructure
from nemo_dist_pipeline.partition.skeleton import NO_PIPELINE, Run, forward, skeleton
from nemo_dist_pipeline.partition.stage_model import StageInfo, keep_stage, open_stage, set_hollow_dtype

_LENGTH = 7  # of the rows that blocks are tried on


def require_exact(model: Any, structure: ModelStructure, stages: Sequence[StageInfo]) -> None:
    """Raise ValueError unless every block gets on its stage what it gets in the whole model, bit for bit.

    The output of the last stage must be that of the whole model, too. Runs on stand-ins for blocks and weights; see
    ``skeleton``.
    """
    blocks = {name: model.get_submodule(name) for name in structure.layers}
    first = skeleton(model, blocks)
    keep_stage(first, stages[0], structure, torch.device("cpu"))
    _require_own_initialisation(first)
    _require_equal_stages(model, structure, stages, training=False)
    if has_own_code(model):
        _require_equal_microbatches(model)
        _require_equal_stages(model, structure, stages, training=True)
        for training in (False, True):
            _require_nothing_passed_by(model, stages, training)


def _require_equal_stages(model: Any, structure: ModelStructure, stages: Sequence[StageInfo], training: bool) -> None:
    kind = type(model).__name__
    blocks = {name: model.get_submodule(name) for name in structure.layers}
    whole = Run(places=structure.places)
    whole.output = forward(skeleton(model, blocks, training), whole)
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


def _require_nothing_passed_by(model: Any, stages: Sequence[StageInfo], training: bool) -> None:
    """Raise ValueError where the blocks of a stage compute otherwise when those of earlier stages do not run.

    Blocks can leave values for each other in their attributes, or in what they are given, which no stand-in shows.
    """
    kind = type(model).__name__
    tokens = torch.arange(2 * _LENGTH).view(2, _LENGTH) % model.config.get_text_config().vocab_size
    outputs: dict[str, Any] = {}
    try:
        rehearsal = Rehearsal.of(model)
        rehearsal.model.train(training)
        blocks = {name: rehearsal.model.get_submodule(name) for name in stages[0].blocks}
        hooks = [
            block.register_forward_hook(lambda *call, of=name: outputs.update({of: call[-1]}))
            for name, block in blocks.items()
        ]
        whole = rehearsal.run({"input_ids": tokens})
        for hook in hooks:
            hook.remove()
        rehearsal.run({"input_ids": tokens.flip(1)})  # what is left now is of other tokens
    except Exception:  # whatever a forward of any family raises
        return
    for stage in stages[1:]:
        for name in stage.blocks[: stage.blocks.index(stage.own_blocks[0])]:
            blocks[name].forward = lambda *_, of=name, **__: outputs[of]
        try:
            found = first_difference(whole, rehearsal.run({"input_ids": tokens}), torch.arange(_LENGTH))
            reason = None if found is None else f"{rehearsal.culprit(found) if found else 'its output'} differs"
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        if reason and not rehearsal.draws.unknown:
            raise ValueError(
                f"{kind} computes the blocks of stage {stage.index} otherwise where those of earlier stages do not run "
                f"({reason}), so its blocks leave each other more than hidden states; {NO_PIPELINE}"
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
