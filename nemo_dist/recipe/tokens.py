"""Make rows of tokens and labels of documents: a conversation through its chat template, long text in windows."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from nemo_dist.hf_model import IGNORED
from nemo_dist.models.meta_model import in_one_line
from nemo_dist.planning.validation import shown
from nemo_dist.recipe.config import ALL, DataSection, ModelSection
from nemo_dist.recipe.documents import Document, documents

_BYTES = "bytes"
# Of the loader's options: those that reach any name, and those that say which files of the model's own.
_ACCESS = ("cache_dir", "token", "local_files_only", "trust_remote_code")
_PLACE = ("revision", "code_revision", "subfolder")
_END = "<|end|>"
# The usual form of a chat template, in the words of the tokenizer of bytes.
_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# The parts of a form of strftime that can stand in a template.
_OF_DATES = [f"%{flag}{letter}" for flag in ("", "-") for letter in "aAbBcdDeFHIjmMpSTuUVwWxXyY%"]


@attrs.frozen(eq=False)
class Row:
    """Tokens and labels, int32 of one length; ``lengths`` are those of the sequences that are packed into it.

    ``score``: of a row of a pair, the logarithm of the probability that the reference gives to its labels.
    """

    tokens: Tensor
    labels: Tensor
    lengths: tuple[int, ...]
    score: float | None = None


def tokenizer_of(model: ModelSection, data: DataSection) -> Any:
    """Return the tokenizer of the recipe with the chat template that it asks for; raise ValueError where none is."""
    name = model.tokenizer or model.path
    try:
        tokenizer: Any = byte_tokenizer() if name == _BYTES else _stored(str(name), model)
    except Exception as error:  # every class reads its files in its own way
        raise ValueError(
            f"no tokenizer at {shown(name)}; give model.tokenizer a folder that has one, a name on the hub, or "
            f"'{_BYTES}' ({in_one_line(error)})"
        ) from error
    if data.chat_template is not None:
        try:
            tokenizer.chat_template = Path(data.chat_template).expanduser().read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"data.chat_template: {data.chat_template} is no text in UTF-8 ({error.reason})") from None
    return tokenizer


def _stored(name: str, model: ModelSection) -> Any:
    """Return the tokenizer called *name* by the loader's options that say where files are, and how to reach them.

    Beside a subfolder without one it is the one above, as in an export of the model.
    """
    from transformers import AutoTokenizer

    known = (*_ACCESS, *_PLACE) if name == model.path else _ACCESS
    options = {key: model.options[key] for key in known if key in model.options}
    if "subfolder" in options:
        with suppress(OSError, ValueError):
            return AutoTokenizer.from_pretrained(name, **options)
        options.pop("subfolder")
    return AutoTokenizer.from_pretrained(name, **options)


def byte_tokenizer() -> Any:
    """Return a tokenizer with a token for each byte, and one each for padding, the end and the roles of a chat."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    roles = ["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=_END, pad_token="<|pad|>", additional_special_tokens=roles
    )
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def rows_of(data: DataSection, tokenizer: Any, *, pairs: bool = False) -> list[Row]:
    """Return the rows of *data*, the same in every process: at most ``data.length`` tokens, packed where asked for.

    Text goes on in the next row; a conversation or a prompt with its completion is cut at the end, with a warning, and
    left out where no label is left. ``pairs``: the data are preferences, and rows alternate, chosen and rejected; with
    one of them the other is left out. Raises ValueError where nothing is left.
    """
    cut = _Cut(data, tokenizer)
    found = documents(data.path, data.text)
    rows = list(cut.pairs(found) if pairs else cut.rows(found))
    if cut.shortened or cut.dropped:
        warnings.warn(
            f"{data.path}: {cut.shortened} documents are longer than data.length {data.length} and were cut at the "
            f"end, and {cut.dropped} have no label that counts and were left out",
            stacklevel=2,
        )
    if not rows:
        raise ValueError(f"data: {data.path} has no document with two tokens and a label that counts")
    return list(packed(rows, data.length)) if data.packing else rows


def packed(rows: Iterable[Row], length: int) -> Iterator[Row]:
    """Yield rows of at most *length* tokens, each of as many of *rows* as fit one after the other."""
    waiting: list[Row] = []
    for row in rows:
        if sum(len(one.tokens) for one in waiting) + len(row.tokens) > length:
            yield _joined(waiting)
            waiting = []
        waiting.append(row)
    if waiting:
        yield _joined(waiting)


def _joined(rows: Sequence[Row]) -> Row:
    return Row(
        tokens=torch.cat([row.tokens for row in rows]),
        labels=torch.cat([row.labels for row in rows]),
        lengths=tuple(len(row.tokens) for row in rows),
    )


@attrs.define(eq=False, slots=False)
class _Cut:
    """Tokenizes documents into rows, and counts those that did not fit."""

    data: DataSection
    tokenizer: Any
    shortened: int = 0
    dropped: int = 0

    def rows(self, found: Iterable[Document]) -> Iterator[Row]:
        for document in found:
            if document.rejected is not None:
                raise ValueError(f"data: {document.where} is a preference; set loss.type to 'dpo' to train on it")
            kept = self._rows(document, windows=not document.messages and not document.answer)
            self.dropped += not kept
            yield from kept

    def pairs(self, found: Iterable[Document]) -> Iterator[Row]:
        for chosen in found:
            if chosen.rejected is None:
                raise ValueError(
                    f"data: {chosen.where} is no preference; loss.type 'dpo' takes prompt, chosen and rejected"
                )
            kept = [row for one in (chosen, chosen.rejected) for row in self._rows(one, windows=False)]
            self.dropped += len(kept) < 2
            yield from kept if len(kept) == 2 else ()

    def _rows(self, document: Document, *, windows: bool) -> list[Row]:
        """Return the rows of *document* with a label that counts: one, cut at its end, or ``windows`` of all of it."""
        tokens, labels = self._labelled(document)
        if not windows and len(tokens) > self.data.length:
            self.shortened += 1
            tokens, labels = tokens[: self.data.length], labels[: self.data.length]
        return [row for row in _windows(tokens, labels, self.data.length) if (row.labels != IGNORED).any()]

    def _labelled(self, document: Document) -> tuple[Tensor, Tensor]:
        """Return the tokens of *document*, and their labels."""
        if document.messages:
            text, counted = self._conversation(document)
            tokens, labels = self._encoded(document, text, counted, add_special_tokens=False)
        else:
            counted = [(document.answer, len(document.text))]
            tokens, labels = self._encoded(document, document.text, counted, add_special_tokens=True)
            end = self.tokenizer.eos_token_id
            if end is not None:  # it counts, whether the tokenizer has added it or not
                before = len(tokens) - (tokens[-1:] == [end])
                tokens, labels = [*tokens[:before], end], [*labels[:before], end]
        return torch.tensor(tokens, dtype=torch.int32), torch.tensor(labels, dtype=torch.int32)

    def _encoded(
        self, document: Document, text: str, counted: Sequence[tuple[int, int]], *, add_special_tokens: bool
    ) -> tuple[list[int], list[int]]:
        """Return the tokens of *text*, and their labels: those that lie in one of the spans *counted*."""
        if self.data.train_on == ALL or (counted and counted[0] == (0, len(text))):
            tokens = self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
            return tokens, tokens
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"data: {document.where}: {type(self.tokenizer).__name__} does not say which text a token is from, so "
                f"answers cannot be told apart; set data.train_on to '{ALL}', or use a fast tokenizer"
            )
        made = self.tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
        labels = [
            token if any(start < last and end > first for first, last in counted) else IGNORED
            for token, (start, end) in zip(made["input_ids"], made["offset_mapping"], strict=True)
        ]
        return made["input_ids"], labels

    def _conversation(self, document: Document) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of a conversation, and the spans in it that the assistant says."""
        turns = list(document.messages)
        whole = self._rendered(document, turns)
        if document.tools and whole == self._rendered(attrs.evolve(document, tools=()), turns):
            raise ValueError(
                f"data: {document.where} has tools, which the chat template does not write; take the field out, or set "
                "data.chat_template to a template that does"
            )
        if self.data.train_on == ALL:
            return whole, [(0, len(whole))]
        spans = []
        for index, turn in enumerate(turns):
            if turn["role"] == "assistant":
                before = self._rendered(document, turns[:index], add_generation_prompt=True)
                after = self._rendered(document, turns[: index + 1])
                if not (whole.startswith(after) and after.startswith(before)):
                    raise ValueError(
                        f"data: {document.where}: the chat template writes turn {index + 1} in another way when turns "
                        f"follow, so the answers cannot be found in the text; set data.train_on to '{ALL}', or "
                        "data.chat_template to a template that does not look ahead"
                    )
                spans.append((len(before), len(after)))
        return whole, spans

    def _rendered(self, document: Document, turns: Sequence[Any], add_generation_prompt: bool = False) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                turns,
                tools=list(document.tools) or None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self._dated,
            )
        except Exception as error:  # whatever a template raises, or that there is none
            raise ValueError(f"data: {document.where}: the chat template failed: {error}") from error
        return text

    @cached_property
    def _dated(self) -> dict[str, Any]:
        """What has a template that asks for the date of today write that of the recipe, every day and on every rank."""
        if "strftime_now" not in str(self.tokenizer.chat_template):
            return {}
        written = "raise_exception('it writes the date of today, which a run goes on without tomorrow; set data.date')"
        if self.data.date is not None:
            date = datetime.fromisoformat(self.data.date)
            written = "form" + "".join(f"|replace({part!r}, {date.strftime(part)!r})" for part in _OF_DATES)
        macro = f"{{%- macro strftime_now(form) -%}}{{{{ {written} }}}}{{%- endmacro -%}}"
        return {"chat_template": macro + self.tokenizer.get_chat_template()}


def _windows(tokens: Tensor, labels: Tensor, length: int) -> Iterator[Row]:
    """Yield rows of at most *length* tokens; the first label of a row counts for nothing, nor does a row of one."""
    for start in range(0, len(tokens), length):
        own = labels[start : start + length].clone()
        if len(own) > 1:
            own[0] = IGNORED
            yield Row(tokens=tokens[start : start + length], labels=own, lengths=(len(own),))
