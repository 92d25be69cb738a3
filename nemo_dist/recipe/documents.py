"""Read what to train on: text files, JSON lines, folders of them, and folders that ``datasets`` saved."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from nemo_dist.planning.validation import near, shown

_LINES = (".jsonl", ".ndjson")
_OF_DATASETS = ("dataset_info.json", "state.json", "dataset_dict.json")  # what save_to_disk writes
_MESSAGES, _PROMPT, _COMPLETION = "messages", "prompt", "completion"
_CHOSEN, _REJECTED = "chosen", "rejected"


@attrs.frozen(kw_only=True)
class Document:
    """One example: its ``text``, or the ``messages`` of a conversation, each a mapping with ``role`` and ``content``.

    ``answer``: where in the text the labels begin that count as an answer. ``where`` names the document in errors.
    """

    where: str
    text: str = ""
    answer: int = 0
    messages: tuple[Mapping[str, Any], ...] = ()


def documents(path: str, text: str = "text") -> Iterator[Document]:
    """Yield the documents at *path*, the same in every process; *text* is the field of a line that is text.

    A line of JSON, or a row of ``datasets``, has ``messages``, or ``prompt`` and ``completion``, or *text*. Raises
    ValueError that names the file and the line of one that has none of these, and for a path that is not there.
    """
    for where, row in _rows(path):
        yield row if isinstance(row, Document) else _document(where, row, text)


def preferences(path: str) -> Iterator[tuple[Document, Document]]:
    """Yield the chosen and the rejected document of every line at *path*, as ``documents`` yields its own.

    A line has ``prompt``, ``chosen`` and ``rejected``: all text, or all lists of turns. Of lists, the prompt may stand
    at the beginning of both instead.
    """
    for where, row in _rows(path):
        if not isinstance(row, Mapping) or row.get(_CHOSEN) is None or row.get(_REJECTED) is None:
            raise ValueError(
                f"data: {where} is no preference, with {_PROMPT}, {_CHOSEN} and {_REJECTED} (got "
                f"{shown(sorted(row) if isinstance(row, Mapping) else row)})"
            )
        chosen, rejected = (_answered(where, row, field) for field in (_CHOSEN, _REJECTED))
        yield chosen, rejected


def _answered(where: str, row: Mapping[str, Any], field: str) -> Document:
    prompt, answer = row.get(_PROMPT), row[field]
    if isinstance(answer, str):
        return _completed(where, prompt, field, answer)
    turns = prompt if isinstance(prompt, list) else []
    if not isinstance(answer, list) or isinstance(prompt, str):
        raise ValueError(f"data: {where}: {_PROMPT} and {field} must be text, or lists of turns, both")
    return Document(where=where, messages=tuple(_messages(where, [*turns, *answer])))


def _rows(path: str) -> Iterator[tuple[str, Any]]:
    """Yield where each row of the files at *path* is, and its fields; of a file of text, the document that it is."""
    found = Path(path).expanduser()
    if found.is_file():
        yield from _file(found)
    elif not found.is_dir():
        beside = sorted(entry.name for entry in found.parent.iterdir()) if found.parent.is_dir() else []
        raise ValueError(f"data: there is no {path}{near(found.name, beside)}")
    elif any((found / name).is_file() for name in _OF_DATASETS):
        yield from _saved_by_datasets(found)
    else:
        files = sorted(entry for entry in found.rglob("*") if entry.is_file() and not _hidden(entry, found))
        if not files:
            raise ValueError(f"data: the folder {path} has no files")
        for file in files:
            yield from _file(file)


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _file(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        if path.suffix not in _LINES:
            yield str(path), Document(where=str(path), text=path.read_text(encoding="utf-8"))
            return
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path}, line {number}", _parsed(path, number, line)
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {path} is no text in UTF-8 ({error.reason} at byte {error.start})") from None


def _parsed(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"data: {path}, line {number} is no JSON: {error}") from None


def _saved_by_datasets(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        from datasets import load_from_disk
    except ImportError:
        raise ValueError(
            f"data: {path} was saved by datasets, which is not installed; pip install datasets, or write JSON lines"
        ) from None
    rows = load_from_disk(str(path))
    if isinstance(rows, Mapping):
        raise ValueError(f"data: {path} has the splits {', '.join(rows)}; name the folder of one of them")
    for number, row in enumerate(rows):
        yield f"{path}, row {number}", row


def _document(where: str, row: Any, text: str) -> Document:
    """Return the document in *row*, by the fields that it has."""
    if not isinstance(row, Mapping):
        raise ValueError(f"data: {where} is no mapping of fields (got {shown(row)})")
    if row.get(_MESSAGES) is not None:
        return Document(where=where, messages=tuple(_messages(where, row[_MESSAGES])))
    if row.get(_PROMPT) is not None and row.get(_COMPLETION) is not None:
        return _completed(where, row[_PROMPT], _COMPLETION, row[_COMPLETION])
    if row.get(text) is not None:
        return Document(where=where, text=_of_text(where, text, row[text]))
    raise ValueError(
        f"data: {where} has the fields {shown(sorted(row))}, and none of {_MESSAGES}, {_PROMPT} with {_COMPLETION}, or "
        f"{text} (data.text names another)"
    )


def _completed(where: str, prompt: Any, field: str, answer: Any) -> Document:
    begun, rest = _of_text(where, _PROMPT, prompt), _of_text(where, field, answer)
    return Document(where=where, text=begun + rest, answer=len(begun))


def _of_text(where: str, field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"data: {where}: {field} must be text (got {shown(value)})")
    return value


def _messages(where: str, messages: Any) -> Iterable[Mapping[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"data: {where}: {_MESSAGES} must be a list of turns (got {shown(messages)})")
    for turn in messages:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str) or "content" not in turn:
            raise ValueError(f"data: {where}: a turn has a role and content (got {shown(turn)})")
    return messages
