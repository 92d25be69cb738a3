"""Prove that a model computes a part of a sequence as it computes the whole one, before its weights are read.

A weightless copy of the model runs a short sequence whole, and then as two ranks would, each with its half. Attention
on a half gets what it would get from the other rank: its result is taken from the run on the whole sequence, if
queries, keys, values and masks are those of that run. Everything else must come out the same.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from nemo_dist.hf_model import IGNORED, class_name, has_own_code, predicts_next_token
from nemo_dist.training.kept_state import on_copies
from nemo_dist.training.rehearsal import Rehearsal, Run, first_difference, per_token, same
from nemo_dist_context.attention import SharedAttention, Visible
from nemo_dist_context.batch import NUMBERINGS, SequenceSplitter
from nemo_dist_context.sequence_layout import SequenceLayout

WAYS_OUT = "use cp_size=1, or give a loss of your own, setup.runtime(model, loss=...)"
_RANKS = 2
_CHUNK = 6  # tokens; a rank has two chunks
_LONGEST = 512
# In names of options that say how many tokens are taken together.
_POOLING = ("compress", "pool", "block", "stride", "kernel", "conv")


@attrs.frozen(kw_only=True)
class Proof:
    """How a model that can be split treats a sequence.

    ``numbering``: how it numbers tokens when a batch has no positions. ``causal``: tokens attend to earlier ones only.
    ``heads``: the pairs of numbers of query and key heads that its attentions have. ``loss``: why the model's own loss
    cannot be computed on parts, an empty string where it can.
    """

    numbering: str
    causal: bool
    heads: frozenset[tuple[int, int]]
    loss: str = ""


class Unequal(ValueError):
    """A part of a sequence is not computed as the whole one."""


@attrs.frozen(kw_only=True, eq=False)
class _Call:
    """One attention over the whole sequence."""

    query: Tensor
    key: Tensor
    value: Tensor
    visible: Tensor
    options: Mapping[str, Any]
    output: Tensor


@attrs.define(kw_only=True, eq=False)
class _Rehearsed(SharedAttention):
    """Attention that records its calls on whole sequences, and compares with them on parts."""

    calls: list[_Call] = attrs.field(factory=list)
    done: int = 0
    index: Tensor
    counted: Tensor

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        """Return the attention of a whole sequence; of a part, this rank's part of the same call on the whole one."""
        if not isinstance(attention_mask, Visible):
            output, _ = super().attend(module, query, key, value, attention_mask, **options)
            causal = options.get("is_causal")
            causal = getattr(module, "is_causal", True) if causal is None else causal
            visible = _visible(attention_mask, causal, query.shape[0], key.shape[2])
            call = _Call(query=query, key=key, value=value, visible=visible, options=options, output=output)
            self.calls.append(call)
            return output, None
        if self.done == len(self.calls):
            raise Unequal(f"{class_name(module)} attends more often than on a whole sequence")
        call, self.done = self.calls[self.done], self.done + 1
        pairs = (("queries", call.query, query), ("keys", call.key, key), ("values", call.value, value))
        for name, whole, part in pairs:
            if not self._equal(whole.movedim(2, 1), part.movedim(2, 1)):
                raise Unequal(f"the {name} of {class_name(module)} depend on other tokens, or on their number")
        if options.get("position_bias") is not None or not _same_options(call.options, options):
            raise Unequal(f"{class_name(module)} gives attention a bias that depends on where tokens stand")
        visible = _visible(attention_mask.allowed, attention_mask.causal, len(query), call.key.shape[2], self.index)
        if not self._equal(call.visible.movedim(2, 1).index_select(1, self.index), visible.movedim(2, 1), whole=False):
            raise Unequal(f"{class_name(module)} attends to tokens by a mask that cannot be made for a part")
        return call.output.index_select(1, self.index), None

    def _equal(self, expected: Tensor, found: Tensor, whole: bool = True) -> bool:
        """Compare (rows, tokens, ...) where tokens are no padding; *expected* is of all tokens if *whole*."""
        if whole and expected.shape[1] != len(self.index) * self.layout.size:
            return False
        expected = expected.index_select(1, self.index) if whole else expected
        rows = min(len(expected), len(self.counted))
        return same(expected, found, self.counted[:rows, self.index])


def prove(part: Any, prepare: Any, base: str, loss: str) -> Proof:
    """Return how *part* treats sequences; raise ``Unequal`` with the reason why it cannot compute a part of one.

    ``prepare(model, attention)`` makes a model compute split batches with *attention*; *base* is the attention that the
    model was loaded with. ``loss``: why the model's own loss is not even to be tried, if so.
    """
    attention: _Rehearsed | None = None
    try:
        rehearsal = Rehearsal.of(part)
        reach = min(_reach(rehearsal.model.config.get_text_config().to_dict()), _LONGEST)
        length = 2 * _RANKS * max(_CHUNK, reach + 1)
        attention = _Rehearsed(
            layout=_layout(0), group=None, method="all_gather", base=base, index=torch.empty(0), counted=torch.empty(0)
        )
        prepare(rehearsal.model, attention)
        plain, padded = (_batch(rehearsal.model, length, pads) for pads in (False, True))
        batches = (plain, padded)
        if not loss:
            try:
                return _first_that_fits(rehearsal, attention, batches)
            except Exception as error:
                loss = f"its loss does not come out the same ({_brief(error)}); {WAYS_OUT}"
        unlabelled = tuple({name: value for name, value in batch.items() if name != "labels"} for batch in batches)
        return attrs.evolve(_first_that_fits(rehearsal, attention, unlabelled), loss=loss)
    except Unequal:
        raise
    except Exception as error:  # whatever a forward of any family raises
        raise Unequal(
            f"{_where(error)} does not run on a part of a sequence, so it does not leave attention and masks to "
            f"transformers' attention interface ({_brief(error)})"
        ) from error
    finally:
        if attention is not None:
            attention.calls = []  # the rehearsed model, which has it, goes when it is collected


def _first_that_fits(rehearsal: Rehearsal, attention: _Rehearsed, batches: Any) -> Proof:
    failure: Exception | None = None
    causal, loss = True, ""
    heads: set[tuple[int, int]] = set()
    for kind in NUMBERINGS:
        try:
            for batch in batches:
                loss = _compare(rehearsal, attention, batch, kind) or loss
                loss = _compare_in_training(rehearsal, attention, batch, kind) or loss
                causal = causal and all(torch.equal(call.visible, call.visible.tril()) for call in attention.calls)
                heads |= {(call.query.shape[1], call.key.shape[1]) for call in attention.calls}
            return Proof(numbering=kind, causal=causal, heads=frozenset(heads), loss=loss)
        except Exception as error:  # the first one says the most: other numberings need not suit the model at all
            failure = failure or error
    raise failure or Unequal("nothing fits")


def _compare_in_training(rehearsal: Rehearsal, attention: _Rehearsed, batch: dict[str, Tensor], kind: str) -> str:
    """Compare in training, too, what own code may do otherwise there, where what it draws can be made equal."""
    if not has_own_code(rehearsal.model):
        return ""
    try:
        with rehearsal.training():
            return _compare(rehearsal, attention, batch, kind)
    except Exception as error:
        if rehearsal.draws.unknown:
            return ""
        if isinstance(error, Unequal):
            raise Unequal(f"in training, {error}") from error
        raise


def _compare(rehearsal: Rehearsal, attention: _Rehearsed, batch: dict[str, Tensor], kind: str) -> str:
    """Raise Unequal where the parts of *batch*, numbered by *kind*, are not what the whole gives.

    Returns why that does not hold for the loss of the model, or an empty string.
    """
    rows, length = batch["input_ids"].shape
    mask = batch.get("attention_mask", torch.ones(rows, length))
    attention.calls, attention.counted = [], mask != 0
    with on_copies([rehearsal.model]):
        whole = rehearsal.run(batch)
    losses: list[Tensor] = []
    labels: list[Tensor] = []
    for rank in range(_RANKS):
        layout = _layout(rank)
        attention.layout, attention.done = layout, 0
        attention.index = torch.tensor(layout.indices(length))
        split = splitter_of(rehearsal.model, layout, kind, causal=True)(batch)
        with on_copies([rehearsal.model]):
            part = rehearsal.run(split)
        _require_equal(rehearsal, whole, part, attention)
        if "labels" in batch:
            counts = split.get("shift_labels", split["labels"])
            losses.append(part.output.loss)
            labels.append((counts != IGNORED).sum())
    if not losses:
        return ""
    counted = torch.stack(labels)
    total = (torch.stack(losses) * counted).sum() / counted.sum()
    equal = same(whole.output.loss.reshape(1), total.reshape(1))
    return "" if equal else f"its loss is not a mean over tokens; {WAYS_OUT}"


def _require_equal(rehearsal: Rehearsal, whole: Run, part: Run, attention: _Rehearsed) -> None:
    index = attention.index
    if not per_token(whole):
        raise Unequal(
            "its outputs are not one for each token (of a whole sequence, say), so no rank has a part of them"
        )
    name = first_difference(whole, part, index, attention.counted[:, index])
    if name is not None:
        where = f"in {rehearsal.culprit(name)}" if name else "in its output"
        raise Unequal(f"tokens depend on each other outside of attention, {where}")
    if attention.done != len(attention.calls):
        raise Unequal("it attends less often than on a whole sequence")


def splitter_of(model: Any, layout: SequenceLayout, numbering: str, causal: bool) -> SequenceSplitter:
    """Return what splits the batches of *model*."""
    return SequenceSplitter(
        layout=layout,
        shifts=predicts_next_token(model),
        numbering=numbering,
        causal=causal,
        pad_token=_pad_token(model),
    )


def _pad_token(model: Any) -> int | None:
    return getattr(model.config.get_text_config(), "pad_token_id", None)


def _layout(rank: int) -> SequenceLayout:
    return SequenceLayout(size=_RANKS, rank=rank, balanced=True)


def _batch(model: Any, length: int, padded: bool) -> dict[str, Tensor]:
    """Return a batch of two rows; *padded*, on the left and on the right, else one row has such a token inside."""
    config = model.config.get_text_config()
    pad = _pad_token(model) or 0
    tokens = (torch.arange(2 * length).view(2, length) * 7 + 3) % config.vocab_size
    tokens = torch.where(tokens == pad, (pad + 1) % config.vocab_size, tokens)
    classes = config.vocab_size if not hasattr(model, "num_labels") or predicts_next_token(model) else 2
    if not padded:
        tokens[0, length // 2] = pad  # as a separator, which some models number anew, and others leave out
        return {"input_ids": tokens, "labels": tokens % classes}
    places = torch.arange(length)
    mask = torch.stack((places >= 3, places < length - 4)).long()
    tokens = torch.where(mask == 0, pad, tokens)
    return {
        "input_ids": tokens,
        "attention_mask": mask,
        "labels": torch.where(mask == 0, IGNORED, tokens % classes),
    }


def _reach(value: Any, name: str = "") -> int:
    """Return the largest number of tokens that options of the config say to be taken together, or 0."""
    if isinstance(value, Mapping):
        return max((_reach(inner, str(key)) for key, inner in value.items()), default=0)
    if isinstance(value, list | tuple):
        return max((_reach(inner, name) for inner in value), default=0)
    number = isinstance(value, int) and not isinstance(value, bool)
    return value if number and any(word in name for word in _POOLING) else 0


def _visible(mask: Tensor | None, causal: bool, rows: int, keys: int, index: Tensor | None = None) -> Tensor:
    """Return which keys the queries see, bool of (rows, 1, queries, keys); *index*: the places of the queries."""
    index = torch.arange(keys) if index is None else index
    if mask is None:
        all_keys = torch.arange(keys)
        seen = all_keys <= index[:, None] if causal else torch.ones(len(index), keys, dtype=torch.bool)
        return seen.expand(rows, 1, -1, -1)
    return (mask if mask.dtype == torch.bool else mask > -1).expand(rows, -1, len(index), -1)


def _same_options(whole: Mapping[str, Any], part: Mapping[str, Any]) -> bool:
    """Whether attention gets the same numbers: scales and caps, and tensors of floating-point numbers."""
    for name, value in whole.items():
        other: Any = part.get(name)
        if isinstance(value, Tensor):
            if value.is_floating_point() and not (value is other or (value.shape == other.shape)):
                return False
        elif isinstance(value, float) and value != other:
            return False
    return True


def _where(error: BaseException) -> str:
    """Return the class of the innermost module that was running when *error* was raised."""
    found = "its forward"
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            found = class_name(owner)
    return found


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
