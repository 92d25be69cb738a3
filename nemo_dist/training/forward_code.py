"""Read in the code of modules what no comparison of outputs tells: what they draw, and which parameters they write."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import attrs
from torch import nn

from nemo_dist.hf_model import forward_source, plain_class

Path = tuple[str, ...]  # the names in ``self.a.b``, without ``self``

_DRAWS = frozenset({"rand", "random", "uniform"})  # functions of torch, numpy and random, of a number from 0 to 1


@attrs.frozen(kw_only=True, eq=False)
class Chance:
    """An option, the attribute ``path`` of *module*, that code of it compares with a random number."""

    name: str
    module: nn.Module
    path: Path

    @property
    def value(self) -> Any:
        """What the option is now, None where the module has none."""
        return value_at(self.module, self.path)

    @property
    def acts(self) -> bool:
        """Whether the next forward depends on it."""
        return self.module.training and isinstance(self.value, int | float) and self.value > 0


def chances(model: nn.Module) -> Iterator[Chance]:
    """Yield the options of modules of *model* that their code compares with a random number, as LayerDrop does."""
    for name, module in model.named_modules():
        kind: Any = plain_class(module)
        for path in compared_with_draws(kind):
            yield Chance(name=name, module=module, path=path)


@lru_cache(maxsize=4096)
def compared_with_draws(kind: type[Any]) -> tuple[Path, ...]:
    """Return the attributes that code of *kind* compares with a random number, as LayerDrop does with its rate."""
    nodes = list(_nodes(kind))
    drawn = {
        target.id
        for node in nodes
        if isinstance(node, ast.Assign) and _draws(node.value)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    found: dict[Path, None] = {}
    for node in nodes:
        sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
        if any(_draws(side) or (isinstance(side, ast.Name) and side.id in drawn) for side in sides):
            found |= dict.fromkeys(filter(None, map(_path, sides)))
    return tuple(found)


@lru_cache(maxsize=4096)
def written_data(kind: type[Any]) -> tuple[Path, ...]:
    """Return the attributes whose ``data`` code of *kind* changes in place, as in ``self.weight.data.clamp_()``."""
    calls = [node.func for node in _nodes(kind) if isinstance(node, ast.Call)]
    changing = [one for one in calls if isinstance(one, ast.Attribute) and one.attr.endswith("_")]
    paths = [_path(one.value) for one in changing]
    return tuple(dict.fromkeys(path[:-1] for path in paths if path[-1:] == ("data",)))


def value_at(module: Any, path: Path) -> Any:
    """Return the attribute of *module* at *path*, None where it has none."""
    for name in path:
        module = getattr(module, name, None)
    return module


def _nodes(kind: Any) -> Iterator[ast.AST]:
    """Yield what the code of *kind* is made of, without what makes an instance."""
    try:
        tree = ast.parse(forward_source(kind))
    except SyntaxError:  # a class inside of a function
        return
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if not (isinstance(node, ast.FunctionDef) and node.name == "__init__"):
            yield node
            waiting += ast.iter_child_nodes(node)


def _draws(node: ast.AST) -> bool:
    called = [one.func for one in ast.walk(node) if isinstance(one, ast.Call)]
    return any((one.attr if isinstance(one, ast.Attribute) else getattr(one, "id", "")) in _DRAWS for one in called)


def _path(node: ast.AST) -> Path:
    """Return the names in ``self.a.b``, without ``self``; nothing for another expression."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return tuple(names) if isinstance(node, ast.Name) and node.id == "self" else ()
