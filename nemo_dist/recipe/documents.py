"""Read what to train on: text files, JSON lines, folders of them, and folders that ``datasets`` saved."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs

from nemo_dist.models.meta_model import in_one_line
from nemo_dist.planning.validation import shown
from nemo_dist.setup.file_names import near_file

_JSON = ".json"
_LINES = (".jsonl", ".ndjson")
_TABLES = (".csv", ".tsv", ".parquet", ".arrow")
_OF_DATASETS = ("dataset_info.json", "state.json", "dataset_dict.json")  # what save_to_disk writes
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # in JSON: one of a pair that stands for a letter
_MESSAGES, _PROMPT, _COMPLETION = "messages", "prompt", "completion"
_TOOLS = "tools"
_CHOSEN, _REJECTED = "chosen", "rejected"


@attrs.frozen(kw_only=True)
class Document:
    """One example: its ``text``, or the ``messages`` of a conversation, each a mapping with ``role`` and ``content``.

    ``answer``: where in the text the labels begin that count as an answer. ``where`` names the document in errors.
    ``tools``: of a conversation, the tools that the assistant may call, as chat templates take them.
    ``rejected``: of a preference, the document that this one was chosen over.
    """

    where: str
    text: str = ""
    answer: int = 0
    messages: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    rejected: Document | None = None


def documents(path: str, text: str = "text") -> Iterator[Document]:
    """Yield the documents at *path*, the same in every process; *text* is the field of a line that is text.

    A row of JSON or of ``datasets`` has ``messages``, or ``prompt`` and ``completion``, or *text*. Raises
    ValueError that names the file and the line of one that has none of these, and for a path that is not there.
    """
    for file in files_of(path):
        yield from _saved_by_datasets(file, text) if file.is_dir() else _file(file, text)


def files_of(path: str) -> list[Path]:
    """Return the files of documents at *path*, or the folder itself that ``datasets`` saved.

    Raises ValueError for a path that is not there, and for files that are hardly meant to be read as text.
    """
    found = Path(path).expanduser()
    if found.is_file():
        files = [found]
    elif not found.is_dir():
        raise ValueError(f"data: there is no {path}{near_file(found)}")
    elif any((found / name).is_file() for name in _OF_DATASETS):
        return [found]
    else:
        files = sorted(entry for entry in found.rglob("*") if entry.is_file() and not _hidden(entry, found))
    if not files:
        raise ValueError(f"data: the folder {path} has no files")
    for file in files:
        if _kind(file) in _TABLES:
            raise ValueError(f"data: {file} is a table; save it with datasets' save_to_disk, or write JSON lines")
    others = [file.name for file in files if _kind(file) not in (_JSON, *_LINES)]
    if 0 < len(others) < len(files):
        raise ValueError(
            f"data: {path} has JSON, and {shown(others)}, which would be read as text; leave these out, or name a file"
        )
    return files


def _kind(file: Path) -> str:
    return file.suffix.lower()


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _file(path: Path, text: str) -> Iterator[Document]:
    try:
        if _kind(path) not in (_JSON, *_LINES):
            yield Document(where=str(path), text=path.read_text(encoding="utf-8"))
            return
        for where, row in _rows_of_json(path):
            yield _document(where, row, text)
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {path} is no text in UTF-8 ({error.reason} at byte {error.start})") from None


def _rows_of_json(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield where each row of JSON is, and the row: a line, or an item of the list that all of a file is."""
    if _kind(path) == _JSON:
        with suppress(json.JSONDecodeError):  # it has lines
            whole = _loaded(str(path), path.read_text(encoding="utf-8"))
            rows = whole if isinstance(whole, list) else [whole]
            yield from ((f"{path}, item {number}", row) for number, row in enumerate(rows, start=1))
            return
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path}, line {number}", _parsed(path, number, line)


def _parsed(path: Path, number: int, line: str) -> Any:
    where = f"{path}, line {number}"
    try:
        return _loaded(where, line)
    except json.JSONDecodeError as error:
        raise ValueError(f"data: {where} is no JSON: {error}") from None


def _loaded(where: str, text: str) -> Any:
    """Return the value of the JSON *text*; raise JSONDecodeError for none, ValueError for what cannot be read of it."""
    try:
        value = json.loads(text)
        if _HALF.search(text):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError:
        raise
    except UnicodeEncodeError:
        raise ValueError(
            f"data: {where} has half of a surrogate pair, as \\ud83d alone, which stands for no letter; take it out"
        ) from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, and as many levels
        raise ValueError(f"data: {where} is no JSON that can be read: {error}") from None


def _saved_by_datasets(path: Path, text: str) -> Iterator[Document]:
    try:
        from datasets import load_from_disk
    except ImportError:
        raise ValueError(
            f"data: {path} was saved by datasets, which is not installed; pip install datasets, or write JSON lines"
        ) from None
    try:
        rows = load_from_disk(str(path))
    except Exception as error:  # of its own, of its tables', or of Python on a state that is damaged
        raise ValueError(f"data: datasets cannot read {path}: {in_one_line(error)}") from error
    if isinstance(rows, Mapping):
        raise ValueError(f"data: {path} has the splits {', '.join(rows)}; name the folder of one of them")
    for number, row in enumerate(rows):
        yield _document(f"{path}, row {number}", row, text)


def _document(where: str, row: Any, text: str) -> Document:
    """Return the document in *row*, by the fields that it has."""
    if not isinstance(row, Mapping):
        raise ValueError(f"data: {where} is no mapping of fields (got {shown(row)})")
    if row.get(_MESSAGES) is not None:
        return _conversation(where, row, row[_MESSAGES])
    if row.get(_CHOSEN) is not None and row.get(_REJECTED) is not None:
        return attrs.evolve(_answered(where, row, _CHOSEN), rejected=_answered(where, row, _REJECTED))
    if row.get(_PROMPT) is not None and row.get(_COMPLETION) is not None:
        return _answered(where, row, _COMPLETION)
    if row.get(text) is not None:
        return Document(where=where, text=_of_text(where, text, row[text]))
    raise ValueError(
        f"data: {where} has the fields {shown(sorted(row))}, and none of {_MESSAGES}, {_PROMPT} with {_COMPLETION}, or "
        f"{text} (data.text names another)"
    )


def _answered(where: str, row: Mapping[str, Any], field: str) -> Document:
    """Return the document of the prompt of *row* and the answer in *field*: texts, or turns of a conversation."""
    prompt, answer = row.get(_PROMPT), row[field]
    if field != _COMPLETION and isinstance(answer, list) and isinstance(prompt, list | None):
        return _conversation(where, row, [*(prompt or ()), *answer])
    begun, rest = _of_text(where, _PROMPT, prompt), _of_text(where, field, answer)
    return Document(where=where, text=begun + rest, answer=len(begun))


def _of_text(where: str, field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"data: {where}: {field} must be text (got {shown(value)})")
    return value


def _conversation(where: str, row: Mapping[str, Any], messages: Any) -> Document:
    tools = row.get(_TOOLS)
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise ValueError(f"data: {where}: {_TOOLS} must be a list of mappings (got {shown(tools)})")
    return Document(where=where, messages=tuple(_messages(where, messages)), tools=tuple(tools or ()))


def _messages(where: str, messages: Any) -> Iterable[Mapping[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"data: {where}: {_MESSAGES} must be a list of turns (got {shown(messages)})")
    for turn in messages:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str) or "content" not in turn:
            raise ValueError(f"data: {where}: a turn has a role and content (got {shown(turn)})")
    return messages
