"""Messages between a pool and its ranks: a function by name, its arguments, and the result or failure."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import attrs


@attrs.frozen(kw_only=True)
class Reference:
    """A module-level function by name and file, so that another process can find it."""

    module: str
    file: str | None
    name: str

    @classmethod
    def to(cls, function: Callable[..., Any]) -> Reference:
        """Return a reference to *function*; raise TypeError for one that another process cannot find by name."""
        module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
        if module is None or name is None or "<" in name:
            raise TypeError(
                f"ranks can only run functions that are defined at the top of a module (got {function!r}); "
                "move it there, and pass what it closes over as arguments"
            )
        return cls(module=module, file=getattr(sys.modules.get(module), "__file__", None), name=name)

    def find(self) -> Callable[..., Any]:
        """Import the module, by name or else from its file, and return the function."""
        found: Any = self._module()
        for part in self.name.split("."):
            found = getattr(found, part)
        function: Callable[..., Any] = found
        return function

    def _module(self) -> ModuleType:
        if self.module in sys.modules:
            return sys.modules[self.module]
        try:
            spec = importlib.util.find_spec(self.module)
        except (ImportError, ValueError):
            spec = None
        if self.file is not None and (spec is None or spec.origin is None or not _same(spec.origin, self.file)):
            # pytest's importlib mode gives test modules names that cannot be imported, or that other modules have.
            return _load(self.module, self.file)
        return importlib.import_module(self.module)


def _same(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _load(name: str, file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load module {name!r} from {file}")
    module = importlib.util.module_from_spec(spec)
    parts = name.split(".")
    for parent in (".".join(parts[:depth]) for depth in range(1, len(parts))):
        if parent not in sys.modules:
            # pickle imports every parent package of a dotted name; pytest creates the same empty parents.
            try:
                importlib.import_module(parent)
            except ImportError:
                sys.modules[parent] = ModuleType(parent)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@attrs.frozen(kw_only=True)
class Call:
    """One function call to send; *arguments* are pickled separately, as unpickling may need the function's module.

    ``fresh``: the rank first gives back the process groups of earlier calls. All ranks must do so before one call.
    """

    function: Reference
    arguments: bytes
    path: tuple[str, ...]
    fresh: bool


@attrs.frozen(kw_only=True)
class Reply:
    """The result of a call on one rank: a pickled value, or the failure as text (in full, and in one line)."""

    value: bytes = b""
    failure: str = ""
    error: str = ""
    at: float = attrs.field(factory=time.time)
    open_files: int = 0
    groups: int = 0

    @property
    def failed(self) -> bool:
        """Whether the call raised, or its rank died."""
        return bool(self.error)
