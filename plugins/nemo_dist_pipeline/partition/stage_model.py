"""Turn a full transformers model into one stage, which runs the model's own forward from block to block.

The forward of a stage is that of the whole model. Before the stage's first block it computes with zeros in place of the
weights of the first stage; there the hidden states of the previous stage take the place of what comes of that. It ends
at the first block of the next stage, with that block's input. So everything between two blocks runs once, and what all
blocks get besides hidden states (masks, rotary embeddings) is made by the model itself on every stage.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from nemo_dist.hf_model import INITIALIZED
from nemo_dist.plugin.forwards import wrap_forward
from nemo_dist_pipeline.partition.model_structure import ModelStructure
from nemo_dist_pipeline.partition.stand_in import StandIn
from nemo_dist_pipeline.partition.tower_inputs import note_tower_inputs


@attrs.frozen(kw_only=True)
class StageInfo:
    """A stage of the pipeline: its ``index``, and the full names of the modules that every stage owns.

    ``blocks``: the names of the blocks of the model. ``hidden``: the shape of the hidden states, in which "rows" and
    "length" stand for those of the batch. ``tied``: the name of the head's weight and that of the embedding's, where
    the two are one.
    """

    index: int
    division: tuple[tuple[str, ...], ...]
    blocks: tuple[str, ...]
    hidden: tuple[int | str, ...]
    tied: tuple[str, str] | None = None

    @property
    def count(self) -> int:
        """The number of stages over all ranks."""
        return len(self.division)

    @property
    def modules(self) -> tuple[str, ...]:
        """The full names of the modules that this stage owns."""
        return self.division[self.index]

    @property
    def is_first(self) -> bool:
        """Whether it has the embedding."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether it has the head, and so the loss."""
        return self.index == self.count - 1

    @property
    def own_blocks(self) -> tuple[str, ...]:
        """The names of the blocks that this stage owns; at least one."""
        return tuple(name for name in self.modules if name in set(self.blocks))

    def hidden_shape(self, rows: int, length: int) -> tuple[int, ...]:
        """Return the shape of the hidden states between stages for inputs of (rows, length)."""
        sizes = {"rows": rows, "length": length}
        return tuple(sizes[size] if isinstance(size, str) else size for size in self.hidden)


@attrs.frozen(kw_only=True, eq=False)
class PipelineInfo:
    """The stages of this rank, in order, and the model of each in ``model_parts``."""

    schedule: str
    stages: tuple[StageInfo, ...]
    model_parts: tuple[nn.Module, ...]
    num_stages: int
    pp_rank: int
    pp_size: int

    @property
    def has_first_stage(self) -> bool:
        """Whether this rank has the embedding."""
        return any(stage.is_first for stage in self.stages)

    @property
    def has_last_stage(self) -> bool:
        """Whether this rank has the head, and so the loss and the logits."""
        return any(stage.is_last for stage in self.stages)


class EndOfStage(Exception):  # not an error: it carries the hidden states out of the model's forward
    """Ends the forward of a stage at the first block of the next one, whose input is ``hidden``."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class EarlierBlock(StandIn):
    """A block of an earlier stage: returns its input, in a tuple of ``places`` where the model expects one."""

    def __init__(self, replaced: nn.Module, places: int) -> None:
        super().__init__(replaced)
        self._places = places

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the hidden states that the block got."""
        hidden = self.hidden(args, kwargs)
        return (hidden, *[None] * (self._places - 1)) if self._places else hidden


class LaterBlock(StandIn):
    """A block of a later stage: ends the forward."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raise EndOfStage with the hidden states that the block got."""
        raise EndOfStage(self.hidden(args, kwargs))


@attrs.define(eq=False)
class Entry:
    """Where hidden states enter a stage: the input of its first block is replaced by ``received``, where there is one.

    ``dtype`` is that of the input that the model itself made; ``made`` that of the hidden states before they travelled,
    if that is known; ``used`` says that the block ran.
    """

    received: Tensor | None = None
    made: torch.dtype | None = None
    dtype: torch.dtype | None = None
    used: bool = False

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Replace the hidden states in the arguments of *block*; a forward pre-hook."""
        self.used = True
        name = None if args else next(iter(kwargs))
        self.dtype = (args[0] if name is None else kwargs[name]).dtype
        if self.received is None:
            return None
        hidden = self.received.to(self.made or self.received.dtype)
        return ((hidden, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: hidden})


def stages_of(structure: ModelStructure, division: tuple[tuple[str, ...], ...]) -> list[StageInfo]:
    """Return all stages of a model with *structure* whose units are dealt as in *division*."""
    fixed: dict[str, Any] = {"blocks": structure.layers, "hidden": structure.hidden, "tied": structure.tied}
    return [StageInfo(index=index, division=division, **fixed) for index in range(len(division))]


def keep_stage(model: Any, stage: StageInfo, structure: ModelStructure, device: torch.device) -> None:
    """Edit *model* in place into *stage*; parameters keep their names in the full model.

    The last stage keeps the weight of a tied embedding, because it is the head's.
    """
    note_tower_inputs(model, stage.blocks[0])
    own = stage.own_blocks
    at = stage.blocks.index(own[0])
    for index, name in enumerate(stage.blocks):
        if name not in own:
            block = model.get_submodule(name)
            model.set_submodule(name, EarlierBlock(block, structure.places) if index < at else LaterBlock(block))
    tied = stage.tied if stage.tied and (stage.is_last or _head_comes_first(model, stage)) else ()
    kept = set(tied) if stage.is_first or stage.is_last else set()
    for unit in structure.units:
        if unit not in stage.modules and unit not in stage.blocks:
            _hollow(model, unit, kept, device)
    here = dict(model.named_parameters(remove_duplicate=False))
    ties = dict(getattr(model, "all_tied_weights_keys", None) or {})
    model.all_tied_weights_keys = {name: source for name, source in ties.items() if name in here and source in here}
    if stage.tied and kept:
        _tie(model, *stage.tied)
    if not stage.is_last:
        wrap_forward(model, _until_its_end)
    model.pipeline_stage = stage


def open_stage(model: Any) -> None:
    """Let hidden states enter *model*, a stage; call it last, so that other hooks of its first block see them."""
    stage: StageInfo = model.pipeline_stage
    model.pipeline_entry = Entry()
    first = model.get_submodule(stage.own_blocks[0])
    first.register_forward_pre_hook(model.pipeline_entry, prepend=True, with_kwargs=True)


def run_stage(model: Any, hidden: Tensor | None, inputs: dict[str, Any]) -> Any:
    """Run *model*, an opened stage, on *hidden* (None at the first one); return hidden states or the model's output."""
    entry: Entry = model.pipeline_entry
    entry.received, entry.used = hidden, False
    try:
        output = model(**inputs)
    finally:
        entry.received = None
    if hidden is not None and not entry.used:
        first = model.pipeline_stage.own_blocks[0]
        raise RuntimeError(
            f"the forward of a stage left out its first block, {first}, and with it the stages before; a model that "
            "leaves out blocks takes pp_size=1"
        )
    return output


def set_hollow_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Give the zeros in place of weights of other stages the *dtype* in which the first stage computes with them."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and hasattr(value, INITIALIZED) and value.is_floating_point():
                setattr(module, name, _zeros(value.shape, dtype, value.device))


def _until_its_end(forward: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        forward(*args, **kwargs)
    except EndOfStage as end:
        return end.hidden
    raise RuntimeError("the forward of a stage did not reach the next one")


def _hollow(model: nn.Module, unit: str, kept: Collection[str], device: torch.device) -> None:
    """Put zeros that take no memory in place of the parameters of *unit* other than *kept*; no parameters any more."""
    for path, module in model.get_submodule(unit).named_modules(prefix=unit):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if f"{path}.{name}" not in kept:
                delattr(module, name)
                setattr(module, name, _zeros(parameter.shape, parameter.dtype, device))


def _zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    zeros = torch.zeros((), dtype=dtype, device=device).expand(shape)
    setattr(zeros, INITIALIZED, True)
    return zeros


def _head_comes_first(model: nn.Module, stage: StageInfo) -> bool:
    """Whether the whole model calls its tied weight by its name in the head, which the first stage then must, too."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return stage.tied is not None and names.index(stage.tied[0]) < names.index(stage.tied[1])


def _tie(model: nn.Module, head: str, embedding: str) -> None:
    """Tie the head to the embedding now; transformers does so after loading, when a strategy has sharded both.

    Sharded by itself the embedding, whose output is not used on the last stage, would break FSDP2, which cannot finish
    a backward without synchronisation for a module that has none.
    """
    owner, _, name = head.rpartition(".")
    setattr(model.get_submodule(owner), name, model.get_parameter(embedding))
