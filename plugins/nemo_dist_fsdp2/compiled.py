"""Compile the blocks of a model, and warn where nothing of them is compiled.

torch runs a layer that recomputes as it is, without a word, where it cannot compile the whole of it.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import nn

from nemo_dist.hf_model import class_name

_JUDGED = 2  # the training forward that is judged; the first one may compute what is kept for all later ones


def compile_blocks(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Compile each of *blocks* of *model* on its first call; warn of those that run uncompiled in training."""
    for block in blocks:
        block.compile()
    watch = _Watch([block for block in blocks if any(True for _ in block.children())])
    watch.start(model)


@attrs.define(eq=False)
class _Watch:
    """Knows which modules Python ran in a forward: of a module that is compiled only its graph runs."""

    blocks: Sequence[nn.Module]
    forwards: int = 0
    ran: set[nn.Module] = attrs.field(factory=set)

    def start(self, model: nn.Module) -> None:
        """Watch the forwards of *model*; the hooks stay, as blocks without them might be compiled anew."""
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._judge)
        for block in self.blocks:
            for child in block.children():
                child.register_forward_pre_hook(self._note)

    def _begin(self, *_: Any) -> None:
        self.ran.clear()  # a recomputation has been here, too

    def _note(self, module: nn.Module, _: Any) -> None:
        if not torch.compiler.is_compiling():
            self.ran.add(module)

    def _judge(self, *_: Any) -> None:
        if not torch.is_grad_enabled():
            return
        self.forwards += 1
        if self.forwards != _JUDGED:
            return
        left = Counter(class_name(block) for block in self.blocks if self.ran.issuperset(block.children()))
        if left:
            what = ", ".join(f"{count} {name}" for name, count in left.items())
            warnings.warn(
                f"enable_compile compiles nothing of {what}: torch runs a layer that recomputes as it is where it "
                "cannot compile all of it, as routers with a loss, tensor-parallel layers and attention over cp ranks; "
                "leave activation_checkpointing or enable_compile out",
                stacklevel=2,
            )
