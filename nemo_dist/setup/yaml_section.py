"""Read the ``distributed:`` section of a YAML file, and nothing else of it, or all of a recipe, in bounded time.

A file is parsed into nodes, and only those that are asked for become values. So the tags and dates of other sections
than ``distributed:`` mean nothing to who reads that one. Merge keys (``<<``) work; an alias counts as often as it is
used.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import attrs
import yaml

from nemo_dist.planning.validation import shown
from nemo_dist.setup.file_names import near_file

_LARGEST = 2**20  # bytes of a file
_DEEPEST = 64  # levels of nesting
_MOST = 10_000  # values in the section, each alias counted
_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"
_SCALARS = tuple(f"{_TAG}{kind}" for kind in ("null", "bool", "int", "float"))
_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")  # a number to people; YAML 1.1 reads text: 1e-4
_TEXTS = tuple(f"{_TAG}{kind}" for kind in ("str", "timestamp"))  # a date is no option, and its error quotes the text


def read_yaml(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """Return the ``distributed:`` section of the YAML file at *path*; other sections are ignored.

    Raises ValueError for a file that is not YAML, and for a section that is missing, repeats a key, or holds what is no
    plain value: another tag, a key that is no text, an alias of a part around it, 64 levels or 10,000 values.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"the path of a YAML file must be a path (got {shown(path)})")
    values = _Values(os.fspath(path)[:400])
    root = values.parsed(path)
    found = values.pairs(root) if isinstance(root, yaml.MappingNode) else {}
    section = found.get("distributed")
    if not isinstance(section, yaml.MappingNode):
        keys = [key for key in found if isinstance(key, str)]
        listed = f"the keys {', '.join(map(_word, keys[:10]))}{', ...' * (len(keys) > 10)}" if keys else "no keys"
        values.fail(f"has no 'distributed:' section with keys of its own (it has {listed})")
    content: dict[str, Any] = values.of(section)
    return content


def read_texts(path: str | os.PathLike[str], section: str) -> dict[str, str]:
    """Return the keys of *section* in the YAML file at *path*, with their text as it is written; "" for no scalar.

    Empty for a file without such a section. Errors as for ``read_yaml``.
    """
    values = _Values(os.fspath(path)[:400], f"under '{section}:'")
    root = values.parsed(path)
    node = values.pairs(root).get(section) if isinstance(root, yaml.MappingNode) else None
    found = values.pairs(node) if isinstance(node, yaml.MappingNode) else {}
    texts = {key: one.value if isinstance(one, yaml.ScalarNode) else "" for key, one in found.items()}
    return {key: text for key, text in texts.items() if isinstance(key, str)}


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the YAML file at *path*, a mapping, as plain values; errors as for ``read_yaml``."""
    values = _Values(os.fspath(path)[:400], "in it")
    root = values.parsed(path)
    if not isinstance(root, yaml.MappingNode):
        values.fail("has no sections: it is no mapping")
    content: dict[str, Any] = values.of(root)
    return content


def read_value(text: str, where: str) -> Any:
    """Return the YAML *text* as a plain value; errors as for ``read_yaml``, which call the text *where*."""
    values = _Values(where, "in it")
    root = values.composed(text.encode(errors="replace"))
    return None if root is None else values.of(root)


class _Loader(yaml.SafeLoader):
    """Parses into nodes, up to a depth, so that nesting ends in one error."""

    def __init__(self, stream: bytes) -> None:
        super().__init__(stream)
        self.depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > _DEEPEST:
            event: Any = self.peek_event()  # type: ignore[no-untyped-call]
            line = event.start_mark.line + 1
            raise yaml.YAMLError(f"it nests more than {_DEEPEST} levels at line {line}")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


@attrs.define
class _Values:
    """Makes plain values of the nodes of the file at *where*."""

    where: str
    part: str = "under 'distributed:'"  # of the file, for errors
    left: int = _MOST
    around: set[int] = attrs.field(factory=set)  # the nodes that contain the one being read, by id
    read: dict[int, dict[Any, yaml.Node]] = attrs.field(factory=dict)

    def fail(self, problem: str, node: yaml.Node | None = None) -> NoReturn:
        place = "" if node is None else f" at line {node.start_mark.line + 1}"
        raise ValueError(f"{self.where} {problem}{place}")

    def parsed(self, path: str | os.PathLike[str]) -> yaml.Node | None:
        """Return the root node of the file, None for an empty one."""
        try:
            with Path(path).open("rb") as stream:
                content = stream.read(_LARGEST + 1)
        except ValueError:  # a NUL, or a letter that no file system has
            self.fail("is no path")
        except OSError as error:
            raise type(error)(f"{self.where} cannot be read: {error.strerror}{near_file(path)}") from None
        return self.composed(content)

    def composed(self, content: bytes) -> yaml.Node | None:
        """Return the root node of YAML, None for an empty one."""
        if len(content) > _LARGEST:
            self.fail(f"is larger than {_LARGEST} bytes, which no configuration is")
        try:
            loader = _Loader(content)
            root: yaml.Node | None = loader.get_single_node()
        except yaml.YAMLError as error:
            text = " ".join(str(error).split())
            self.fail(f"is not YAML that can be read: {text[:400]}{'...' * (len(text) > 400)}")
        return root

    def of(self, node: yaml.Node) -> Any:
        """Return the plain value of *node*."""
        self._count(1)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if node.tag not in (f"{_TAG}map", f"{_TAG}seq"):
            self._refuse_tag(node)
        if isinstance(node, yaml.MappingNode):
            items = self.pairs(node)
            for key in items:
                if not isinstance(key, str):
                    self.fail(f"has a key {self.part} that is no text ({_word(key.value)})", key)
            with self._inside(node):
                return {key: self.of(value) for key, value in items.items()}
        with self._inside(node):
            return [self.of(value) for value in node.value]

    def pairs(self, node: yaml.MappingNode) -> dict[Any, yaml.Node]:
        """Return the nodes of a mapping by key, with those that it merges; a key that is no text is its own node."""
        if id(node) in self.read:
            return self.read[id(node)]
        own: dict[Any, yaml.Node] = {}
        merged: dict[Any, yaml.Node] = {}
        with self._inside(node):
            for key, value in node.value:
                if key.tag == _MERGE:
                    for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                        if not isinstance(source, yaml.MappingNode):
                            self.fail("merges what is no mapping", key)
                        merged = self.pairs(source) | merged
                    continue
                name = key.value if isinstance(key, yaml.ScalarNode) and key.tag in _TEXTS else key
                if name in own:
                    line = node.start_mark.line + 1
                    self.fail(f"has a key twice: {_word(name)} stands twice in the mapping at line {line}; keep one")
                own[name] = value
        self._count(len(merged))
        self.read[id(node)] = merged | own
        return self.read[id(node)]

    def _count(self, values: int) -> None:
        self.left -= values
        if self.left < 0:
            self.fail(f"has more than {_MOST} values {self.part}, aliases counted")

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        if node.tag in _TEXTS:
            bare = node.style is None and _EXPONENT.fullmatch(node.value)  # not in quotes
            return float(node.value) if bare else node.value
        if node.tag not in _SCALARS:
            self._refuse_tag(node)
        try:
            return yaml.SafeLoader("").construct_object(node)
        except Exception:  # whatever the constructors raise for what they cannot read
            kind = node.tag.removeprefix(_TAG)
            self.fail(f"has {_word(node.value)}, which is no {kind}", node)

    def _refuse_tag(self, node: yaml.Node) -> NoReturn:
        tag = node.tag.replace(_TAG, "!!")
        self.fail(f"has the tag {_word(tag)} {self.part}, where only plain values are allowed", node)

    @contextmanager
    def _inside(self, node: yaml.Node) -> Iterator[None]:
        if id(node) in self.around:
            self.fail("has a part that contains itself", node)
        if len(self.around) == _DEEPEST:
            self.fail(f"nests more than {_DEEPEST} levels, aliases counted,", node)
        self.around.add(id(node))
        yield
        self.around.discard(id(node))


def _word(value: object) -> str:
    """Return a key or scalar as text, shortened."""
    return shown(value).strip("'")
