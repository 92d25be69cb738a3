"""Train the modules that PEFT would copy (``modules_to_save``) themselves: a rank has only shards to copy.

PEFT keeps the module that was there, for when adapters are disabled, and trains a copy. Here there is one: that of the
model, which its strategy shards and trains. Its parameters have the names that PEFT gives those of the copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import peft.utils.other
from peft.utils import ModulesToSaveWrapper
from torch import nn

from nemo_dist.hf_model import class_name
from nemo_dist.mesh.rank_group import RankGroup

# What PEFT adds to ``modules_to_save`` for a type of task; one of them is the model's.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

_Wrapper: Any = ModulesToSaveWrapper  # PEFT annotates only a part


class ModuleInPlace(_Wrapper):  # type: ignore[misc]
    """PEFT's wrapper around a module of ``modules_to_save``, which trains the module itself in place of a copy.

    Without the adapter that it belongs to, PEFT computes with what was there before the training. That is gone, so a
    forward raises RuntimeError then.
    """

    in_place = True  # plugins read it, which do not import this module

    def __init__(self, module_to_save: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        self._kept = [module_to_save]  # in a list, so that it is not registered twice
        super().__init__(module_to_save, adapter_name, **kwargs)
        del self.original_module

    @property
    def original_module(self) -> nn.Module:
        """The module, which PEFT asks for in places."""
        return self._kept[0]

    def update(self, adapter_name: str, tied_module: nn.Module | None = None, **kwargs: Any) -> None:
        """Train the module for *adapter_name*; raise ValueError for a second one, as there is one module."""
        if any(name != adapter_name for name in self.modules_to_save):
            raise ValueError(
                f"adapter {adapter_name!r} has modules_to_save that adapter {', '.join(self.modules_to_save)!r} trains "
                "already, in place, as a rank has only shards of them; leave them out of the second adapter, or train "
                "it from a model of its own"
            )
        self.modules_to_save[adapter_name] = self.original_module
        super().update(adapter_name, **kwargs)

    @property
    def active(self) -> bool:
        """Whether the adapter that the module belongs to is the active one."""
        return not self.disable_adapters and any(name in self.modules_to_save for name in self.active_adapters)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module; raise RuntimeError where its adapter is disabled or another one is active."""
        if not self.active or kwargs.get("adapter_names") is not None:
            raise RuntimeError(
                f"a module of modules_to_save ({class_name(self.original_module)}) was trained in place, so the "
                "model as it was before is gone, which disable_adapter, another adapter or adapter_names ask for; load "
                "that a second time, frozen"
            )
        return super().forward(*args, **kwargs)


def modules_in_place(part: nn.Module) -> dict[str, ModuleInPlace]:
    """Return the modules of *part* that are trained in place, by name."""
    return {name: module for name, module in part.named_modules() if isinstance(module, ModuleInPlace)}


@contextmanager
def without_copies() -> Iterator[None]:
    """Within the context, PEFT wraps modules of ``modules_to_save`` by ``ModuleInPlace``."""
    theirs: Any = peft.utils.other
    theirs.ModulesToSaveWrapper = ModuleInPlace
    try:
        yield
    finally:
        theirs.ModulesToSaveWrapper = ModulesToSaveWrapper


def refuse_modules(parts: Sequence[nn.Module], config: Any, ranks: RankGroup) -> None:
    """Raise ValueError where ``modules_to_save`` of *config* cannot be trained in place; collective if there are any.

    These are names of no module, which PEFT would leave out in silence, weights that other modules use too, and modules
    within one another.
    """
    given = list(getattr(config, "modules_to_save", None) or ())
    task = getattr(config, "task_type", None)
    heads = _HEADS.get(str(getattr(task, "value", task)), ()) if hasattr(config, "modules_to_save") else ()
    names = list(dict.fromkeys([*given, *heads]))
    if not names:
        return
    found = {name: [key for part in parts for key in _named(part) if key.endswith(name)] for name in names}
    counts = dict(zip(names, ranks.total([len(found[name]) for name in names]), strict=True))
    missing = [name for name in given if not counts[name] and name not in heads]
    if missing:
        raise ValueError(
            f"modules_to_save has {missing[0]!r}, which is the end of no module's name; give names of modules"
        )
    if not any(counts.values()):
        raise ValueError(
            f"task_type={task!s} trains the head of the model ({' or '.join(heads)}), which has none of that name; "
            "name it in modules_to_save"
        )
    problems = [problem for part in parts for problem in _problems(_named(part), tuple(names))]
    if ranks.total([len(problems)])[0]:
        raise ValueError("; ".join(problems[:3]) or "modules_to_save names a module of another rank that it refuses")


def _named(part: nn.Module) -> dict[str, nn.Module]:
    return dict(part.named_modules(remove_duplicate=False))


def _problems(modules: Mapping[str, nn.Module], names: tuple[str, ...]) -> Iterator[str]:
    """Say which of *modules* whose names end in one of *names* cannot be trained in place."""
    chosen = {key: module for key, module in modules.items() if key.endswith(names)}
    for key, module in chosen.items():
        outer = next((other for other in chosen if key.startswith(f"{other}.")), None)
        if outer is not None:
            yield f"modules_to_save names {outer} and, within it, {key}; leave out the name of one"
        own = {id(parameter) for parameter in module.parameters()}
        within = {id(each) for each in module.modules()}
        rest = [other for other in modules.values() if id(other) not in within]
        if any(id(parameter) in own for other in rest for parameter in other.parameters(recurse=False)):
            yield (
                f"modules_to_save names {key}, whose weight another module uses too (it is tied): PEFT would train a "
                "copy, and here both would be trained; leave it out, and to train the shared weight call "
                "requires_grad_(True) on it once the adapters are added, which runtime.save and runtime.export write"
            )
