"""Let modules write into the dicts and lists that they are given, as layers do that leave values for later ones.

``fully_shard`` hands every module copies of them, with its own tensors in them, so that what a module writes is lost.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import attrs
from torch import nn


@attrs.frozen(eq=False)
class _Copied:
    """A dict or list as the caller has it, the copy that the module got, and what was in that."""

    original: Any
    given: Any
    before: Any

    def write_back(self) -> None:
        """Put into the original what the module put into its copy."""
        if isinstance(self.original, list):
            same = dict(zip(map(id, self.before), self.original, strict=False))
            if list(map(id, self.given)) != list(map(id, self.before)):
                self.original[:] = [same.get(id(value), value) for value in self.given]
            return
        for name in self.before.keys() - self.given.keys():
            self.original.pop(name, None)
        for name, value in self.given.items():
            if name not in self.before or value is not self.before[name]:
                self.original[name] = value


def keep_writes(module: nn.Module) -> None:
    """Let *module*, after ``fully_shard``, write into the dicts and lists that its caller gives it."""
    calls: list[Any] = []

    def first(_: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append((args, kwargs))

    def last(_: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append(list(_copies(calls.pop(), (args, kwargs))))

    def after(*_: Any) -> None:
        for copied in calls.pop():
            copied.write_back()

    module.register_forward_pre_hook(first, prepend=True, with_kwargs=True)
    module.register_forward_pre_hook(last, with_kwargs=True)
    module.register_forward_hook(after, always_call=True)


def _copies(original: Any, given: Any) -> Iterator[_Copied]:
    """Yield the dicts and lists in *original*, each with the copy of it in *given*."""
    if original is given or type(original) is not type(given):
        return
    if isinstance(original, dict):
        inside = [(value, given[name]) for name, value in original.items() if name in given]
    elif isinstance(original, list | tuple):
        inside = list(zip(original, given, strict=False))
    else:
        return
    if not isinstance(original, tuple):
        yield _Copied(original, given, copy.copy(given))
    for one, other in inside:
        yield from _copies(one, other)
