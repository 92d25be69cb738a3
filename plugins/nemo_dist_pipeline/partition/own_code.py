"""Prove, at load, that stages compute what a model with the user's own code does, its blocks and its loss included.

Such blocks can leave values for each other in their attributes, or in what they are given, and such a forward can read
labels, weights and the outputs of its blocks anywhere, which no stand-in for blocks shows. So a copy of the model
without weights, blocks and all, runs on a few rows, once whole and once stage by stage.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor
from transformers.utils import ModelOutput

from nemo_dist.hf_model import IGNORED, accepts
from nemo_dist.training.loss_weighting import OWN_LOSS
from nemo_dist.training.rehearsal import Rehearsal, Run, same
from nemo_dist_pipeline.partition.layer_outputs import BY_LAYER
from nemo_dist_pipeline.partition.model_structure import ModelStructure
from nemo_dist_pipeline.partition.skeleton import NO_PIPELINE
from nemo_dist_pipeline.partition.stage_model import StageInfo, keep_stage, open_stage
from nemo_dist_pipeline.partition.stand_in import StandIn

_ROWS, _LENGTH = 2, 7


def require_exact_code(model: Any, structure: ModelStructure, stages: Sequence[StageInfo]) -> str:
    """Raise ValueError where the stages of *model* in sequence compute otherwise than the whole model.

    Return why, given labels, they compute another loss; an empty text where they do not. What cannot be run on tokens
    alone, or draws what cannot be made equal, is not judged.
    """
    try:
        proof = _Proof(Rehearsal.of(model), structure, stages)
    except Exception:  # whatever a class of the user's own raises
        return ""
    kind, answer = type(model).__name__, ""
    for inputs in proof.batches():
        found = proof.problem(inputs)
        without = {name: value for name, value in inputs.items() if name != "labels"}
        if found and (without.keys() == inputs.keys() or proof.problem(without)):
            raise ValueError(
                f"{kind} computes otherwise where the blocks and weights of earlier stages are not there ({found}), "
                f"so its blocks leave each other more than hidden states, or its forward reads more; {NO_PIPELINE}"
            )
        if found:
            answer = f"{kind} computes another loss where its blocks are on several stages ({found}); {OWN_LOSS}"
    return answer


@attrs.frozen(eq=False)
class _Proof:
    """A copy of the model without weights, ``rehearsal``, to be run whole and as ``stages``; itself it never runs."""

    rehearsal: Rehearsal
    structure: ModelStructure
    stages: Sequence[StageInfo]

    def __attrs_post_init__(self) -> None:
        self.rehearsal.model.tie_weights()

    def batches(self) -> Iterator[dict[str, Any]]:
        """Yield small batches: tokens; with labels and padding; with labels, to a model in training."""
        model = self.rehearsal.model
        tokens = torch.arange(_ROWS * _LENGTH).view(_ROWS, _LENGTH) % model.config.get_text_config().vocab_size
        mask = torch.ones(_ROWS, _LENGTH, dtype=torch.long)
        mask[1, -2:] = 0
        given = {"input_ids": tokens}
        yield given
        tried = _labels(model, tokens) if accepts(model, "labels") else ()
        labels = next((one for one in tried if self._whole(given | {"labels": one}) is not None), None)
        if labels is not None:
            given["labels"] = labels
            yield given | {"attention_mask": mask}
        model.train()
        yield given

    def _whole(self, inputs: Mapping[str, Any]) -> Run | None:
        """Run the whole model; None where that fails, or draws what cannot be made equal for its stages."""
        part = self._copied(self.structure.layers)
        try:
            run = part.run(inputs)
        except Exception:  # whatever a forward of the user's own raises
            return None
        return None if part.draws.unknown else run

    def _copied(self, blocks: Sequence[str]) -> Rehearsal:
        """Return a copy that has these *blocks*, and nothing in it that a run left; with the same weights."""
        model = self.rehearsal.model
        memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
        for name in self.structure.layers:
            if name not in blocks:
                memo[id(model.get_submodule(name))] = StandIn(model.get_submodule(name))
        return Rehearsal(copy.deepcopy(model, memo), self.rehearsal.weights)

    def problem(self, inputs: Mapping[str, Any]) -> str:
        """Return what the stages make of *inputs* otherwise than the whole model; nothing where they do not."""
        whole = self._whole(inputs)
        if whole is None:
            return ""
        hidden: Any = None
        for stage in self.stages:
            part = self._copied(stage.own_blocks)
            keep_stage(part.model, stage, self.structure, torch.device("cpu"))
            open_stage(part.model)
            part.model.pipeline_entry.received = hidden
            try:
                run = part.run(inputs)
            except Exception as error:
                return f"{type(error).__name__} on stage {stage.index}: {error}"
            if found := self._difference(whole, run, stage):
                return f"{found} differs on stage {stage.index}"
            hidden = run.output
        return ""

    def _difference(self, whole: Run, run: Run, stage: StageInfo) -> str:
        """Return the first module or output of *stage* that was another in the run of the *whole* model."""
        own = tuple(f"{name}." for name in stage.own_blocks)
        for name, tensors in whole.outputs.items():
            others = run.outputs.get(name, [])
            inside = f"{name}.".startswith(own) and len(others) == len(tensors)
            if inside and not all(map(_alike, tensors, others)):
                return self.rehearsal.culprit(name)
        found = _named(run.output) if stage.is_last else {}
        expected = _named(whole.output) if stage.is_last else {}
        return next((name for name, value in expected.items() if not _alike(value, found.get(name))), "")


def _labels(model: Any, tokens: Tensor) -> tuple[Tensor, ...]:
    """Return labels as a loss may take them, for each of *tokens* or for each row; the first tokens have none."""
    classes = (tokens * 5 + 1) % min(model.config.num_labels or 2, 2)
    by_row = classes[:, -1].clone()
    for labels in (words := tokens.clone(), classes):
        labels[0, :3], labels[1, 4:] = IGNORED, IGNORED
    return words, classes, by_row


def _named(output: Any, name: str = "output") -> dict[str, Tensor]:
    """Return the tensors in *output* by name, without the values by layer that no stage gives out."""
    if isinstance(output, Tensor):
        return {name: output}
    items: list[tuple[Any, Any]] = []
    if isinstance(output, Mapping):
        left_out = BY_LAYER if isinstance(output, ModelOutput) else ()
        items = [(key, value) for key, value in output.items() if not str(key).endswith(left_out)]
    elif isinstance(output, tuple | list):
        items = list(enumerate(output))
    return {path: one for key, value in items for path, one in _named(value, f"{name}.{key}").items()}


def _alike(expected: Tensor, found: Tensor | None) -> bool:
    return found is not None and same(expected.nan_to_num(), found.nan_to_num())
