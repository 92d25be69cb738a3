"""Turn a full transformers model into one stage: modules of other stages are replaced by identity."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from nemo_dist.plugin.forwards import wrap_forward
from nemo_dist_pipeline.partition.model_structure import ModelStructure


@attrs.frozen(kw_only=True)
class StageInfo:
    """A stage of the pipeline: its ``index``, and the full names of the modules that every stage owns.

    ``tied``: the name of the head's weight and that of the embedding's, where the two are one.
    """

    index: int
    division: tuple[tuple[str, ...], ...]
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


class ModuleOfOtherStage(nn.Module):
    """Replace a module of another stage by identity: return the first argument."""

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__()
        # A model's forward reads plain attributes of its layers (``attention_type``), also of those on other stages.
        plain = {name: value for name, value in vars(replaced).items() if isinstance(value, str | int | float)}
        self.__dict__.update({name: value for name, value in plain.items() if not name.startswith("_")})

    def forward(self, first: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return *first*."""
        return first


def keep_stage(model: Any, stage: StageInfo, structure: ModelStructure) -> None:
    """Edit *model* in place into *stage*; parameters keep their names in the full model.

    Stages pass hidden states on, which the next one takes as ``inputs_embeds``. A stage without the head returns the
    output of its base model. The last stage keeps a tied embedding, because its weight is the head's.
    """
    kept = set(stage.modules)
    if stage.tied and stage.is_last:
        kept.add(str(structure.owner(stage.tied[1])))
    _replace_by_identity(model, [unit for unit in structure.units if unit not in kept])
    if stage.tied and not stage.is_last:
        model.all_tied_weights_keys = {}  # nothing to tie here: the head is on the last stage
    elif stage.tied:
        _tie(model, *stage.tied)
    if not stage.is_first:
        model.base_model.register_forward_pre_hook(_take_embeddings, with_kwargs=True)
    if not stage.is_last:
        wrap_forward(model, lambda _, **inputs: _hidden_states(model, inputs))
    model.pipeline_stage = stage


def _tie(model: nn.Module, head: str, embedding: str) -> None:
    """Tie the head to the embedding now; transformers does so after loading, when a strategy has sharded both.

    Sharded by itself the embedding, which never runs on the last stage, would break FSDP2, which cannot finish a
    backward without synchronisation for a module that never ran.
    """
    owner, _, name = head.rpartition(".")
    setattr(model.get_submodule(owner), name, model.get_parameter(embedding))


def _replace_by_identity(model: nn.Module, names: Collection[str]) -> None:
    for name in names:
        model.set_submodule(name, ModuleOfOtherStage(model.get_submodule(name)))


def _take_embeddings(base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Drop ``input_ids`` where hidden states come in: a base model takes one or the other.

    The model around it keeps them for its head: a classifier looks for padding in them.
    """
    if kwargs.get("inputs_embeds") is None:
        return None
    if args and args[0] is not None:
        args = (None, *args[1:])
    return args, {**kwargs, **({"input_ids": None} if "input_ids" in kwargs else {})}


def _hidden_states(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Run what a stage without the head has of *model*, its base model, in place of the forward of the whole."""
    hidden: Tensor = model.base_model(**inputs).last_hidden_state
    return hidden


@torch.no_grad()
def require_plain_forward(model: Any, structure: ModelStructure) -> None:
    """Raise ValueError when the base model changes its input outside of its modules.

    Every stage runs the base model's whole forward, so an operation between the modules (a scaled embedding, added
    positions) would run once per stage. A copy with every module replaced by identity must return exactly its input.
    """
    kind = type(model).__name__
    skeleton = copy.deepcopy(model.base_model)
    prefix = next(name for name, module in model.named_modules() if module is model.base_model)
    inside = [unit.removeprefix(f"{prefix}.") for unit in structure.units if unit.startswith(f"{prefix}.")]
    _replace_by_identity(skeleton, inside)
    skeleton.to_empty(device="cpu").eval()
    sent = torch.linspace(-1, 1, 4 * skeleton.config.hidden_size, device="cpu").view(1, 4, -1)
    try:
        returned = skeleton(inputs_embeds=sent, use_cache=False).last_hidden_state
    except Exception as error:
        raise ValueError(
            f"{kind} does not run with its layers in other stages ({type(error).__name__}: {error}), so it cannot be a "
            "pipeline"
        ) from error
    if returned.shape != sent.shape or not torch.equal(returned, sent):
        raise ValueError(
            f"{kind} changes inputs_embeds in its forward, besides its modules (a scaled embedding, say), which every "
            "stage would do again; it cannot be a pipeline"
        )
