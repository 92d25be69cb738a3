"""Find what a model computes of a row by the rows beside it, which ranks and microbatches do not have.

A weightless copy runs rows together and apart: with and without padding, and in training, where a module may do what
it never does in evaluation. There, rows apart get as many forwards as all together, since what one forward leaves shows
in the next; the last one is in evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nemo_dist.hf_model import accepts
from nemo_dist.training.kept_state import on_copies
from nemo_dist.training.made_up_rows import MadeUpRows
from nemo_dist.training.rehearsal import Rehearsal, Run, same

_ROWS, _LENGTH = 4, 12
_SHORT = (12, 7, 10, 5)  # the lengths of padded rows
_EACH = ([0], [1], [2], [3])  # a forward that decides by one of the rows decides otherwise by another
_SOME = ([3, 1], [2])  # the same with fewer runs

Inputs = Mapping[str, Tensor]


def depends_on_rows(model: Any, entries: MadeUpRows | None = None) -> str | None:
    """Return what of a row *model* computes by the rows beside it: the first module, or a buffer; None if nothing.

    None, too, where it cannot be run on tokens alone, with *entries* beside them.
    """
    try:
        rehearsal = Rehearsal.of(model)
    except Exception:  # whatever a constructor of any family raises
        return None
    made = entries or MadeUpRows()
    plain = made(_tokens(model, _ROWS))
    padded = {**plain, "attention_mask": (torch.arange(_LENGTH) < torch.tensor(_SHORT)[:, None]).long()}
    masked = accepts(model, "attention_mask")
    judges = [partial(_in_evaluation, rehearsal, made, plain, _EACH), partial(_in_training, rehearsal, made, plain)]
    if masked:
        judges[1:] = [partial(_in_evaluation, rehearsal, made, padded, _SOME)]
        judges.append(partial(_in_training, rehearsal, made, padded))
    for judge in judges:
        try:
            found = judge()
        except Exception:  # whatever a forward of any family raises
            continue
        if found is not None:
            return found
    return None


def depends_on_padding(model: Any) -> bool:
    """Whether *model* computes a row without padding otherwise beside a padded one.

    Attention that says it is not causal, as PaliGemma's, is causal by its mask alone, which transformers leaves out
    where no row is padded.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if decoder is None or all(getattr(module, "is_causal", True) for module in decoder.modules()):
        return False
    try:
        tokens = _tokens(model, 2)
        mask = torch.ones_like(tokens)
        mask[1, -1] = 0
        rehearsal = Rehearsal.of(model)
        both = rehearsal.run({"input_ids": tokens, "attention_mask": mask})
        alone = rehearsal.run({"input_ids": tokens[:1], "attention_mask": mask[:1]})
        pairs = zip(_results(both), _results(alone), strict=True)
        return any(unlike(ours[:1], theirs) for ours, theirs in pairs if len(ours) == len(tokens))
    except Exception:  # whatever a forward of any family raises
        return False


def _tokens(model: Any, rows: int) -> Tensor:
    words: int = model.config.get_text_config().vocab_size
    return torch.arange(rows * _LENGTH).view(rows, -1) * 5 % words


def _in_evaluation(rehearsal: Rehearsal, made: MadeUpRows, inputs: Inputs, parts: Sequence[list[int]]) -> str | None:
    together = rehearsal.run(inputs)
    for rows in parts:
        some = made.rows(inputs, rows)
        where = _difference(rehearsal, together, rehearsal.run(some), rows, some)
        if where is not None:
            return where
    return None


def _in_training(rehearsal: Rehearsal, made: MadeUpRows, inputs: Inputs) -> str | None:
    together, kept = _trained(rehearsal, inputs)
    if rehearsal.draws.unknown or not _repeats(rehearsal, inputs, together[0]):
        return None  # what is drawn cannot be made equal
    for rows in _SOME:
        some = made.rows(inputs, rows)
        runs, buffers = _trained(rehearsal, some)
        where = next((f"buffer {name}" for name, value in buffers.items() if unlike(kept[name], value)), None)
        for ours, theirs in zip(together, runs, strict=True):
            where = where or _difference(rehearsal, ours, theirs, rows, some)
        if where is not None:
            return where
    return None


def _trained(rehearsal: Rehearsal, inputs: Inputs) -> tuple[list[Run], dict[str, Tensor]]:
    """Return two runs in training and one in evaluation after them, and the buffers then; the copy is as before."""
    with on_copies([rehearsal.model]):
        with rehearsal.training():
            runs = [rehearsal.run(inputs) for _ in range(2)]
        buffers = {name: value.clone() for name, value in rehearsal.model.named_buffers()}
        return [*runs, rehearsal.run(inputs)], buffers


def _repeats(rehearsal: Rehearsal, inputs: Inputs, before: Run) -> bool:
    """Whether the copy, as it was before that run, gives the outputs of *before* again."""
    with on_copies([rehearsal.model]), rehearsal.training():
        again = rehearsal.run(inputs)
    return not any(unlike(ours, theirs) for ours, theirs in zip(_results(before), _results(again), strict=True))


def _difference(rehearsal: Rehearsal, together: Run, apart: Run, rows: list[int], inputs: Inputs) -> str | None:
    """Return the first module whose outputs for *rows* differ where these, *inputs*, run apart."""
    counted = inputs.get("attention_mask", torch.ones(apart.shape)) != 0
    for name, tensors in together.outputs.items():
        for ours, theirs in zip(tensors, apart.outputs.get(name, []), strict=False):
            if unlike(ours[rows], theirs, counted):
                return rehearsal.culprit(name)
    for ours, theirs in zip(_results(together), _results(apart), strict=False):
        per_token = ours.shape[:2] == together.shape
        if len(ours) == _ROWS and unlike(ours[rows], theirs, counted if per_token else None):
            return "its output"
    return None


def _results(run: Run) -> list[Tensor]:
    """Return the floating-point tensors that the model returned, without those in lists."""
    output = run.output
    values = (
        list(output.values()) if isinstance(output, dict) else list(output) if isinstance(output, tuple) else output
    )
    found = values if isinstance(values, list) else [values]
    return [value for value in found if isinstance(value, Tensor) and value.is_floating_point() and value.ndim]


def unlike(ours: Tensor, theirs: Tensor, counted: Tensor | None = None) -> bool:
    """Whether two tensors of finite numbers differ; a copy without weights may make others.

    Where *counted* (rows, length) is given, only in what it counts; own code may have cut off columns at the end.
    """
    if counted is not None and _but_for_length(ours) == _but_for_length(theirs):
        length = min(ours.shape[1], theirs.shape[1])
        if counted[:, length:].any():
            return True
        ours, theirs = (value[:, :length][counted[:, :length]] for value in (ours, theirs))
    return bool(ours.isfinite().all() and theirs.isfinite().all()) and not same(ours, theirs)


def _but_for_length(value: Tensor) -> tuple[int, ...]:
    return (value.ndim, *value.shape[:1], *value.shape[2:])
