"""Run the forward of a model around its blocks, on the CPU, with small stand-ins for blocks and weights.

What a model does between its modules shows in such a run, at any size of the model: which module runs when, what every
block is given, and in what form its output is read. Weights are views of short vectors, and a block turns the features
of its input round.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from transformers import Cache

from nemo_dist.hf_model import accepts
from nemo_dist.training.fixed_draws import FixedDraws, repeatable
from nemo_dist.training.router_aux_loss import SWITCH
from nemo_dist_pipeline.partition.stand_in import StandIn

NO_PIPELINE = "it does not run as a pipeline, so use pp_size=1 (fsdp2 and tp split it, too)"
_ROWS, _LENGTH = 3, 13  # of the batch; numbers that no other size of a model is likely to have
_FORMS = (0, 6, 2, 3, 1, 4, 5)  # lengths of the tuple that a block may return, in the order in which they are tried


def block_list(model: Any) -> dict[str, nn.Module]:
    """Return the blocks of *model* by full name: the list of its decoder that has most parameters.

    Raises ValueError for a model without one.
    """
    decoder = model.get_decoder()
    prefix = next((name for name, module in model.named_modules() if module is decoder), "")
    lists = _lists(decoder, prefix) or _lists(model, "")  # some models call their head a decoder
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of blocks that could be dealt to stages; {NO_PIPELINE}")
    name = max(lists, key=lambda name: sum(parameter.numel() for parameter in lists[name].parameters()))
    return {f"{name}.{index}": block for index, block in enumerate(lists[name])}


def _lists(module: nn.Module, prefix: str) -> dict[str, nn.ModuleList]:
    """Return the lists of modules in *module* by full name, without those inside others."""
    found: dict[str, nn.ModuleList] = {}
    for name, child in module.named_modules(prefix=prefix):
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(child, nn.ModuleList) and len(child) and not inside:
            found[name] = child
    return found


class Unread:
    """Stands for what a block returns besides hidden states; a model that passes it on cannot be cut there."""


class UnfitBlockError(ValueError):
    """The blocks of a model do not take hidden states first, or do not run once each in order."""


class SharedStateError(UnfitBlockError):
    """The blocks of a model pass each other more than hidden states."""


@attrs.define(eq=False)
class Run:
    """What was seen in one run: the arguments of every block, and how many blocks had run when a module first did.

    ``draws.unknown``: what was drawn and is not the same in another run.
    """

    places: int = 0
    draws: FixedDraws = attrs.field(factory=FixedDraws)
    given: dict[str, dict[str, Any]] = attrs.field(factory=dict)
    modules: dict[str, set[int]] = attrs.field(factory=dict)
    order: list[str] = attrs.field(factory=list)
    blocks: tuple[str, ...] = ()
    output: Any = None

    @property
    def hidden(self) -> tuple[int | str, ...]:
        """The shape of the hidden states, with the names of the sizes of the batch."""
        shape: list[int | str] = list(next(iter(next(iter(self.given.values())).values())).shape)
        for name, size in (("rows", _ROWS), ("length", _LENGTH)):
            shape[shape.index(size)] = name
        return tuple(shape)

    def when(self, unit: str) -> set[str]:
        """Return when modules of *unit* ran: "before" or "after" the blocks, or "between" them."""
        counts = {count for name, found in self.modules.items() if f"{name}.".startswith(f"{unit}.") for count in found}
        last = len(self.blocks)
        return {"before" if count == 0 else "after" if count == last else "between" for count in counts}

    def first_call(self, unit: str) -> int:
        """Return the place of *unit* in the order of the modules that ran; 0 for one that did not."""
        return next((i for i, name in enumerate(self.order, 1) if f"{name}.".startswith(f"{unit}.")), 0)


class ProbeBlock(StandIn):
    """Stands for a block: notes what it is given, and returns its input with the features turned round by one."""

    def __init__(self, replaced: nn.Module, name: str) -> None:
        super().__init__(replaced)
        self._name = name
        self.run = Run()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what stands for the output of the block."""
        run = self.run
        given = self.given(args, kwargs)
        hidden = next(iter(given.values()))
        if not isinstance(hidden, Tensor) or not hidden.is_floating_point():
            raise UnfitBlockError(f"its block {self._name} is given no hidden states first")
        if {_ROWS, _LENGTH} - set(hidden.shape):
            raise UnfitBlockError(f"the hidden states of {self._name} are not of (rows, length, features)")
        if self._name in run.given:
            raise UnfitBlockError(f"it runs its block {self._name} more than once")
        for name, value in given.items():
            if any(isinstance(leaf, Unread | Cache) or _is_empty(leaf) for leaf in _leaves(value)):
                raise SharedStateError(f"its blocks pass each other more than hidden states (as {name!r})")
        run.given[self._name] = {name: _kept(value) for name, value in given.items()}
        turned = hidden.roll(1, -1) + 0.01 * int(self._name.rpartition(".")[2])
        return (turned, *[Unread()] * (run.places - 1)) if run.places else turned


def observe(model: Any, blocks: Mapping[str, nn.Module]) -> Run:
    """Run *model* with stand-ins for *blocks* and weights, and return what was seen; raise ValueError if that fails."""
    problems: list[tuple[bool, int, Exception]] = []
    for places in _FORMS:
        bare = skeleton(model, blocks)
        run = Run(places=places, blocks=tuple(blocks))
        try:
            _watch(bare, run)
            run.output = forward(bare, run)
            missing = [name for name in blocks if name not in run.given]
            if missing or list(run.given) != list(blocks):
                raise UnfitBlockError(f"it does not run its blocks once each, in order ({', '.join(missing[:3])})")
            if len({tuple(next(iter(given.values())).shape) for given in run.given.values()}) > 1:
                raise UnfitBlockError("its hidden states have other shapes in other blocks")
        except Exception as error:
            problems.append((isinstance(error, SharedStateError), len(run.given), error))
            continue
        return run
    cause = max(problems, key=lambda problem: problem[:2])[2]  # that of the form which went furthest
    found = (
        str(cause)
        if isinstance(cause, UnfitBlockError)
        else f"its forward needs them ({type(cause).__name__}: {cause})"
    )
    raise ValueError(f"{type(model).__name__} cannot be cut between its blocks: {found}; {NO_PIPELINE}") from cause


def skeleton(model: Any, blocks: Mapping[str, nn.Module], training: bool = False) -> Any:
    """Return a copy of *model*, which is on meta, with stand-ins for *blocks*; in evaluation, or in training."""
    memo: dict[int, Any] = {id(block): ProbeBlock(block, name) for name, block in blocks.items()}
    return copy.deepcopy(model, memo).train(training)


@torch.no_grad()
def forward(bare: Any, run: Run) -> Any:
    """Run a skeleton, or a stage of one, and return its output; *run* notes what its blocks are given."""
    for module in bare.modules():
        if isinstance(module, ProbeBlock):
            module.run = run
    with torch.device("cpu"):
        _fill(bare)
        with repeatable(run.draws, bare.training):
            return bare(**inputs(bare))


def inputs(model: Any) -> dict[str, Any]:
    """Return a small batch for *model*, with a mask."""
    ids = (torch.arange(_ROWS * _LENGTH, device="cpu").view(_ROWS, _LENGTH) * 7) % 11 + 3
    mask = torch.ones_like(ids)
    mask[0, -4:] = 0
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if getattr(model.config, SWITCH, False):
        given[SWITCH] = False  # stand-ins for blocks have no routers, whose loss is added elsewhere
    return accepted(model, given)


def accepted(model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out of *given* the options that the forward of *model* does not take."""
    return {name: value for name, value in given.items() if accepts(model, name)}


def _watch(bare: nn.Module, run: Run) -> None:
    """Note when every module of *bare* with parameters of its own runs."""

    def note(name: str, *_: Any) -> None:
        run.modules.setdefault(name, set()).add(len(run.given))
        run.order.append(name)

    for name, module in bare.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_pre_hook(partial(note, name))


def _fill(bare: nn.Module) -> None:
    """Give every tensor of *bare* that is on meta values; see ``_values``."""
    for module in bare.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(_values(parameter), requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                module._buffers[name] = _values(buffer)
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor) and value.is_meta:
                setattr(module, name, _values(value))
        if isinstance(module, nn.Linear):
            linear: Any = module  # a method, to a type checker
            linear.forward = _Projection(module.weight, module.bias)


def _values(meta: Tensor) -> Tensor:
    """Return values for a tensor: a view of a vector as long as its sizes together, zeros where they are no floats."""
    if not meta.is_floating_point():
        return torch.zeros((), dtype=meta.dtype, device="cpu").expand(meta.shape)
    vector = torch.sin(torch.arange(sum(meta.shape) + 1, dtype=torch.float32, device="cpu") * 0.7 + 0.3)
    return vector.as_strided(meta.shape, (1,) * meta.dim())


@attrs.frozen(eq=False)
class _Projection:
    """A linear layer of the same shape that costs next to nothing, whatever its size."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, features: Tensor) -> Tensor:
        width = self.weight.shape[1]
        wave = torch.cos(torch.arange(width, device="cpu") * 0.9)
        projected = (features * wave).sum(-1, keepdim=True) / math.sqrt(width) * self.weight[:, 0]
        return projected if self.bias is None else projected + self.bias


def _leaves(value: Any) -> list[Any]:
    """Return what is in nested containers; an empty one, in which blocks could leave something, is a leaf."""
    if isinstance(value, Mapping) and value:
        return [leaf for item in value.values() for leaf in _leaves(item)]
    if isinstance(value, tuple | list) and value:
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


def _is_empty(leaf: Any) -> bool:
    return isinstance(leaf, dict | list) and not leaf


def _kept(value: Any) -> Any:
    """Return a copy of *value*, so that later changes do not show in it."""
    if isinstance(value, Mapping):
        return {key: _kept(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return tuple(_kept(item) for item in value)
    return value.clone() if isinstance(value, Tensor) else value
