"""Prove on a small scale that a module cut by a plan computes what the whole module computes, before a weight is read.

``Recording`` runs the model once on the CPU, with random weights that take little memory, and keeps what every module
is called with. ``prove`` then runs one of these modules whole, and cut over ranks that are threads of this process with
the very forwards that the real ranks get, and compares the output and all gradients. That shows what a plan from a
table of names cannot: whether a norm, a bias or a per-head parameter that stays whole is used alike on all ranks or by
each on heads of its own, and whether a contiguous shard of a packed projection is really the part that a rank needs.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Mapping, MutableMapping, MutableSequence, Sequence
from contextlib import nullcontext
from functools import lru_cache, partial
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.distributed.tensor import Placement, Shard
from transformers.pytorch_utils import Conv1D

from nemo_dist.hf_model import accepts, class_name, compute_experts_one_by_one, has_own_code, plain_class
from nemo_dist.torch_private import StridedShard, changes_in_place, disable_current_modes, tensors_in, tree_map_only
from nemo_dist.training.fixed_draws import FixedDraws, unmoved_generators
from nemo_dist.training.kept_state import on_copies
from nemo_dist.training.rehearsal import read_from_outside
from nemo_dist_tensor.collectives import Peers
from nemo_dist_tensor.simulated_peers import SimulatedPeers, together

ROWS, LENGTH = 2, 6
_FACTOR = 4  # the rank of the random matrices
_WORDS = 64  # rows of an embedding; token ids are smaller
_MOST = 1 << 22  # numbers in a parameter; a larger one repeats its first slice
_EXPERTS = 2  # of an experts' module that is compared
_TOLERANCE = 1e-4
_ELEMENTWISE = ("Mul", "Div", "Tanh", "ToCopy", "Clone", "Alias", "View", "UnsafeView", "Slice")


class ThinLinear(nn.Linear):
    """A linear layer whose matrix is a product of two narrow random ones, ``weight @ into.T``, to save memory."""

    into: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        """Multiply as the layer that this one stands for."""
        return nn.functional.linear(input @ self.into, self.weight, self.bias)


@attrs.frozen(eq=False)
class Call:
    """How the model called a module: its arguments, with the gradient functions that they had."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def second(self) -> str:
        """The name of an argument that is of every token, as the first one is; empty where there is none."""
        given = {**{f"argument {place}": value for place, value in enumerate(self.args, 1)}, **self.kwargs}
        found = [
            name
            for name, value in given.items()
            if isinstance(value, Tensor) and value.is_floating_point() and value.shape[:-1] == (ROWS, LENGTH)
        ]
        return found[1] if len(found) > 1 else ""


@attrs.frozen(eq=False)
class Recording:
    """The ``modules`` of the model with random weights on the CPU by name, and their first calls in order.

    Of blocks that are alike, one runs and stands for all, so that the cost does not grow with the number of layers.
    ``complete``: the run went through to the loss. ``head_is_scaled_only``: between the head and the loss its logits
    are at most scaled, their shape and order unchanged. ``returned``: the modules that return what a linear layer in
    them returned, with that layer.
    """

    modules: Mapping[str, nn.Module]
    calls: Mapping[str, Call]
    returned: Mapping[str, str]
    complete: bool
    head_is_scaled_only: bool

    @classmethod
    def of(cls, model: Any) -> Recording | None:
        """Run a copy of *model* (on meta); None when that does not work, so that nothing is known of its calls."""
        with disable_current_modes(), torch.random.fork_rng(devices=[]), torch.device("cpu"):
            try:
                read = read_from_outside(model)
                twin, alike = _twin(model)
                found = cls._run(twin, alike, read)
                return cls._run(_twin(model)[0], {}, read) if alike and not found.complete else found
            except Exception:
                return None

    @classmethod
    def _run(cls, model: Any, alike: Mapping[str, str], read: Collection[str]) -> Recording:
        """Run *model* with random weights, without the blocks of *alike*, each with the one that stands for it."""
        _materialise(model, set(alike), read)
        _leave_out(model, alike)
        calls: dict[str, Call] = {}
        returned: dict[str, str] = {}
        outputs: dict[str, Any] = {}
        logits: list[Any] = []
        handles: list[Any] = []
        for name, module in model.named_modules():
            if name:
                handles.append(module.register_forward_pre_hook(_recorder(name, calls), with_kwargs=True))
                handles.append(module.register_forward_hook(_follower(name, outputs, returned)))
        head = model.get_output_embeddings()
        if head is not None:
            handles.append(head.register_forward_hook(lambda *call: logits.append(call[-1])))
            model.loss_function = lambda logits_=None, *_, **more: _keep(logits, more.get("logits", logits_))
        complete = True
        with torch.enable_grad(), on_copies([model]):  # what a run leaves in a module cannot be copied
            try:
                model(**_inputs(model))
            except Exception:
                complete = False  # what it called before is known all the same
        for handle in handles:
            handle.remove()
        modules = dict(model.named_modules())
        for block, first in alike.items():
            inside = {name: block + name[len(first) :] for name in modules if f"{name}.".startswith(f"{first}.")}
            modules |= {inside[name]: modules[name] for name in inside}
            calls |= {inside[name]: calls[name] for name in list(calls) if name in inside}
            returned |= {inside[name]: inside[child] for name, child in list(returned.items()) if name in inside}
        return cls(modules, calls, returned, complete, len(logits) == 2 and _scaled_only(logits[1], logits[0]))


def whole_model(model: Any) -> tuple[nn.Module, Call]:
    """Return a copy of *model* (on meta) with random weights, and how to call it for its loss."""
    with disable_current_modes(), torch.random.fork_rng(devices=[]), torch.device("cpu"):
        twin, _ = _twin(model)
        _materialise(twin, (), read_from_outside(model))
        return twin, Call((), _inputs(twin))


def short_model(model: Any, config: Any) -> tuple[Any, dict[str, Any]]:
    """Return such a copy, of *config*, in which one of the blocks that are alike stands for all, and tokens for it."""
    twin, alike = _twin(model, config)
    _materialise(twin, set(alike), read_from_outside(model))
    _leave_out(twin, alike)
    return twin, {name: value for name, value in _inputs(twin).items() if name != "labels"}


def _inputs(model: Any) -> dict[str, Any]:
    ids = torch.randint(3, min(model.config.get_text_config().vocab_size, _WORDS) - 2, (ROWS, LENGTH))
    return {"input_ids": ids, "labels": ids} | ({"use_cache": False} if accepts(model, "use_cache") else {})


def _twin(model: Any, config: Any = None) -> tuple[Any, dict[str, str]]:
    """Return a copy of *model* on meta, and the blocks of it that are like an earlier one, with that one.

    With *config* it is made of that one.
    """
    with torch.device("meta"):
        twin = plain_class(model)(copy.deepcopy(model.config if config is None else config))
    twin = twin.float().eval()
    twin.set_attn_implementation("eager")
    compute_experts_one_by_one(twin)  # the other ways copy the matrices of all experts
    torch.manual_seed(0)
    firsts: dict[Any, str] = {}
    alike, done = {}, ""
    for name, blocks in twin.named_modules():
        if not isinstance(blocks, nn.ModuleList) or (done and name.startswith(done)):
            continue
        done = f"{name}."
        for place, block in blocks.named_children():
            kind = name, tuple((inner, signature(module)) for inner, module in block.named_modules())
            if (first := firsts.setdefault(kind, f"{name}.{place}")) != f"{name}.{place}":
                alike[f"{name}.{place}"] = first
    return twin, alike


def signature(module: nn.Module) -> Any:
    """Return what makes two modules alike: class, parameters, simple attributes other than their number."""
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in module.named_parameters())
    values = tuple(
        (name, value)
        for name, value in sorted(vars(module).items())
        if isinstance(value, int | float | str | bool | None) and not re.search("idx|index|layer_id|number", name)
    )
    return class_name(module), shapes, values


def _leave_out(model: nn.Module, alike: Mapping[str, str]) -> None:
    """Let each block of *alike* return what the one that stands for it returned."""
    outputs: dict[str, Any] = {}
    for block, first in alike.items():
        model.get_submodule(first).register_forward_hook(lambda *call, of=first: outputs.update({of: call[-1]}))
        model.get_submodule(block).forward = lambda *_, of=first, **__: outputs[of]


def _keep(seen: list[Any], logits: Any) -> Tensor:
    seen.append(logits)
    return logits.sum() if isinstance(logits, Tensor) else torch.zeros(())


def _recorder(name: str, calls: dict[str, Call]) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(name, Call(tuple(map(_own, args)), {key: _own(value) for key, value in kwargs.items()}))

    return hook


def _own(value: Any) -> Any:
    """Return a copy of *value* where a module may put something into it for a later one, such as shared keys."""
    return copy.copy(value) if isinstance(value, MutableMapping | MutableSequence) else value


def _follower(name: str, outputs: dict[str, Any], returned: dict[str, str]) -> Callable[..., None]:
    def hook(module: nn.Module, _: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        for child, _inner in module.named_children():
            before, version = outputs.pop(f"{name}.{child}", (None, None))
            if isinstance(first, Tensor) and before is first and version == changes_in_place(first):
                returned[name] = f"{name}.{child}"
        if is_projection(module):
            outputs[name] = first, changes_in_place(first)

    return hook


def _scaled_only(logits: Any, output: Any) -> bool:
    """Whether *logits* come from *output*, of the same shape, by operations on single numbers only."""
    if not isinstance(logits, Tensor) or logits.shape != output.shape:
        return False
    node, end = logits.grad_fn, output.grad_fn
    while node is not None and node is not end:
        before = [found for found, _ in node.next_functions if found is not None]
        if len(before) != 1 or not node.name().startswith(_ELEMENTWISE):
            return False
        node = before[0]
    return node is end


def is_projection(module: nn.Module) -> bool:
    """Whether *module* is a plain linear layer: ``nn.Linear``, or another class that computes the same, or GPT-2's."""
    if isinstance(module, nn.Linear) and type(module) not in (nn.Linear, ThinLinear):
        kind: Any = plain_class(module)
        return _multiplies(kind, module.bias is not None)
    return type(module) in (nn.Linear, Conv1D, ThinLinear)


@lru_cache(maxsize=256)
def _multiplies(kind: type[nn.Linear], bias: bool) -> bool:
    """Whether a layer of the class *kind* computes what ``nn.Linear`` does, found by trying a small one."""
    with disable_current_modes(), torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("cpu"):
        try:
            small = kind.__new__(kind)
            nn.Linear.__init__(small, 5, 3, bias=bias)
            value = torch.randn(2, 4, 5)
            return torch.allclose(small(value), nn.Linear.forward(small, value), rtol=1e-5, atol=1e-6)
        except Exception:
            return False


def _materialise(model: nn.Module, but: Collection[str], read: Collection[str]) -> None:
    """Give *model*, *but* for some blocks, random weights and buffers; ties stay where that matters to no rule.

    The modules *read* keep the shapes of their weights, which code elsewhere takes.
    """
    outside = tuple(f"{block}." for block in but)
    for name, module in model.named_modules():
        if outside and f"{name}.".startswith(outside):
            continue
        if is_projection(module) and name not in read:
            _thin(module)
        for own, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                module._parameters[own] = nn.Parameter(_random(module, parameter))
        for own, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_meta:
                module._buffers[own] = _buffer(own, buffer)
        if isinstance(module, nn.Embedding):
            module.num_embeddings, module.padding_idx = len(module.weight), None


def _thin(module: Any) -> None:
    out, into = (module.nf, module.nx) if isinstance(module, Conv1D) else (module.out_features, module.in_features)
    bias = module.bias is not None
    module.__class__ = ThinLinear
    module.out_features, module.in_features = out, into
    module._parameters.clear()
    module.weight = nn.Parameter(torch.randn(out, _FACTOR) * 0.5)
    module.into = nn.Parameter(torch.randn(into, _FACTOR) / into**0.5)
    module.bias = nn.Parameter(torch.randn(out) * 0.5) if bias else None


def _random(module: nn.Module, parameter: Tensor) -> Tensor:
    shape = list(parameter.shape)
    if isinstance(module, nn.Embedding):
        shape[0] = min(shape[0], _WORDS)
    repeats = shape[0] if len(shape) > 2 and parameter.numel() > _MOST else 1
    if repeats > 1:
        shape[0] = 1
    scale = 1.0 if len(shape) == 1 else 1 / max(shape[-1], 1) ** 0.5
    values = torch.randn(shape) * scale
    if len(shape) == 1:
        values = 1 + 0.3 * values
    return values.expand(repeats, *shape[1:]) if repeats > 1 else values


def _buffer(name: str, buffer: Tensor) -> Tensor:
    if buffer.is_floating_point():
        return torch.rand(buffer.shape) * 0.9 + 0.1
    if buffer.dtype is torch.bool:
        return torch.ones(buffer.shape, dtype=torch.bool).tril() if buffer.dim() > 1 else torch.ones_like(buffer)
    places = torch.arange(buffer.shape[-1]) if buffer.dim() and "position" in name else torch.zeros(())
    return places.expand(buffer.shape).to(buffer.dtype, copy=True)


@attrs.frozen
class Verdict:
    """The outcome of a proof. ``summed``: whole parameters whose gradients the ranks have to sum.

    ``problem`` says what differs, and is empty where nothing does. ``unknown``: it draws what cannot be made equal.
    """

    summed: frozenset[str] = frozenset()
    problem: str = ""
    unknown: bool = False


@attrs.frozen(eq=False)
class _Result:
    output: list[Tensor]
    inputs: list[Tensor | None]
    gradients: Mapping[str, Tensor | None]
    unknown: bool


Cut = Callable[[nn.Module, SimulatedPeers], Mapping[str, Placement | None]]


def prove(unit: nn.Module, call: Call, ranks: int, cut: Cut) -> Verdict:
    """Compare *unit* as it is with the parts that *cut* makes of copies of it for *ranks* simulated ranks.

    ``cut`` installs the forwards of one rank in a copy and returns the placements of its parameters, by name. Random
    generators are left as they were.
    """
    with unmoved_generators(FixedDraws()):  # of the process, so once for all threads that run a part
        unit, call = _fewer_experts(unit, call)
        trained = _in_training(unit) if has_own_code(unit) else None  # before a run leaves something in the unit
        found = _proven(unit, call, ranks, cut)
        if found.problem or trained is None:
            return found
        draws = FixedDraws()
        with unmoved_generators(draws):
            other = _proven(trained, call, ranks, cut)
        if draws.unknown or other.unknown:
            return found
        if other.problem or other.summed != found.summed:
            return Verdict(problem=f"in training, {other.problem or 'other gradients have to be summed'}")
        return found


def _in_training(unit: nn.Module) -> nn.Module | None:
    """Return a copy of *unit* in training; None where it cannot be copied, which is told of it anyway."""
    large = {id(parameter): parameter for parameter in unit.parameters() if parameter.numel() > _MOST}
    try:
        return copy.deepcopy(unit, large).train()
    except Exception:
        return None


def _proven(unit: nn.Module, call: Call, ranks: int, cut: Cut) -> Verdict:
    shared = {id(parameter): parameter for parameter in unit.parameters() if parameter.numel() > _MOST}
    for parameter in shared.values():
        parameter.requires_grad_(False)  # a gradient or a copy of all experts would need gigabytes
    try:
        copies, placements = [], {}
        peers = SimulatedPeers.make(ranks)
        for peer in peers:  # before anything runs: what a run leaves in a module cannot be copied
            twin = copy.deepcopy(unit, dict(shared))
            placements = dict(cut(twin, peer))
            for name, placement in _with_factors(twin, placements).items():
                _shard(twin, name, placement, peer)
            copies.append(twin)
        with disable_current_modes(), torch.device("cpu"):
            whole = _run(unit, call)
        parts = together([partial(_run, each, call) for each in copies], peers[0].exchange)
    except Exception as error:
        return Verdict(problem=f"its forward fails when it is cut ({type(error).__name__}: {str(error)[:200]})")
    if whole.unknown:
        return Verdict(unknown=True)
    return _compare(unit, whole, parts, _with_factors(unit, placements), peers)


def piece(tensor: Tensor, placement: Placement | None, peers: Peers) -> Tensor:
    """Return the part of *tensor* that a rank holds under *placement*; of one that repeats a slice, it does so too."""
    if tensor.ndim > 2 and tensor.stride(0) == 0 and tensor.shape[0] > 1 and getattr(placement, "dim", 0) != 0:
        part = piece(tensor[:1], placement, peers)
        return part.expand(tensor.shape[0], *part.shape[1:])
    if isinstance(placement, StridedShard):
        halves = tensor.chunk(int(placement.split_factor), placement.dim)
        return torch.cat([peers.piece(half, placement.dim) for half in halves], placement.dim)
    return peers.piece(tensor, placement.dim) if isinstance(placement, Shard) else tensor


def _with_factors(unit: nn.Module, placements: Mapping[str, Placement | None]) -> dict[str, Placement | None]:
    """Return *placements* for thin matrices: ``Shard(1)`` of a matrix is ``Shard(0)`` of its second factor."""
    found = {}
    for name, placement in placements.items():
        module = unit.get_submodule(name.rpartition(".")[0])
        if isinstance(module, ThinLinear) and name.endswith("into"):
            continue
        second = isinstance(module, ThinLinear) and name.endswith("weight") and placement == Shard(1)
        found[name.removesuffix("weight") + "into" if second else name] = Shard(0) if second else placement
    return found


def _shard(unit: nn.Module, name: str, placement: Placement | None, peers: Peers) -> None:
    module, own = unit.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    if placement is not None:
        whole = unit.get_parameter(name)
        module._parameters[own] = nn.Parameter(piece(whole.detach(), placement, peers), whole.requires_grad)


def _fewer_experts(unit: nn.Module, call: Call) -> tuple[nn.Module, Call]:
    """Leave an experts' module few experts, or copies of it would need the memory of all."""
    count = getattr(unit, "num_experts", None)
    own = dict(unit.named_parameters(recurse=False))
    if not isinstance(count, int) or count <= _EXPERTS or not any(p.ndim == 3 for p in own.values()):
        return unit, call
    unit = copy.copy(unit)
    unit._parameters = {
        name: nn.Parameter(torch.randn(_EXPERTS, *p.shape[1:]) * max(p.shape[-1], 1) ** -0.5)
        if p.shape[0] == count
        else p
        for name, p in own.items()
    }
    unit.num_experts = _EXPERTS  # type: ignore[assignment]

    def fewer(value: Any) -> Any:
        integers = isinstance(value, Tensor) and value.dtype in (torch.int32, torch.int64)
        return value % _EXPERTS if integers else value

    return unit, Call(tuple(map(fewer, call.args)), {name: fewer(value) for name, value in call.kwargs.items()})


def _run(unit: nn.Module, call: Call) -> _Result:
    """Run forward and backward of *unit*, with random inputs of the recorded shapes; in training with equal draws."""
    draws = FixedDraws()
    generator = torch.Generator().manual_seed(1)
    inputs: list[Tensor] = []

    def fresh(value: Tensor) -> Tensor:
        if not (value.is_floating_point() and value.requires_grad):
            return value.detach().clone()
        inputs.append(torch.randn(value.shape, generator=generator).requires_grad_())
        return inputs[-1]

    args, kwargs = tree_map_only(Tensor, fresh, (tuple(map(_own, call.args)), dict(call.kwargs)))
    kwargs = {name: _own(value) for name, value in kwargs.items()}
    before = {id(tensor) for tensor in _shared(args, kwargs)}
    with torch.enable_grad():
        with draws if unit.training else nullcontext():
            output = unit(*args, **kwargs)
        found = [
            t
            for t in tensors_in(list(output.values()) if isinstance(output, dict) else output)
            if t.is_floating_point()
        ]
        handed_on = [t.detach() for t in _shared(args, kwargs) if id(t) not in before]
        first = found[0]
        direction = torch.randn(first.shape, generator=generator)
        parameters = {name: p for name, p in unit.named_parameters() if p.requires_grad}
        wanted = [*inputs, *parameters.values()]
        grads = torch.autograd.grad((first * direction).sum(), wanted, allow_unused=True)
    return _Result(
        [first.detach(), *handed_on],
        list(grads[: len(inputs)]),
        dict(zip(parameters, grads[len(inputs) :], strict=True)),
        bool(draws.unknown),
    )


def _shared(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors in what modules hand to each other by way of arguments, as layers that share keys do."""
    boxes = [value for value in (*args, *kwargs.values()) if isinstance(value, MutableMapping | MutableSequence)]
    return [
        tensor for box in boxes for tensor in tensors_in(list(box.values() if isinstance(box, MutableMapping) else box))
    ]


def _compare(
    unit: nn.Module,
    whole: _Result,
    parts: list[_Result],
    placements: Mapping[str, Placement | None],
    peers: list[SimulatedPeers],
) -> Verdict:
    if not all(_same(part.output[0], whole.output[0]) for part in parts):
        return Verdict(problem="its output differs")
    if not all(_all_same(part.output, whole.output) for part in parts):
        return Verdict(problem="what it hands on to other modules differs")
    if not all(_all_same(part.inputs, whole.inputs) for part in parts):
        return Verdict(problem="the gradient of its input differs")
    summed = set()
    largest = max((g.norm().item() for g in whole.gradients.values() if g is not None), default=0.0)
    for name, expected in whole.gradients.items():
        mine = [part.gradients.get(name) for part in parts]
        wanted = [None if expected is None else piece(expected, placements.get(name), peer) for peer in peers]
        floor = largest * 1e-3
        if all(_same(a, b, floor) for a, b in zip(mine, wanted, strict=True)):
            continue
        total = sum((g for g in mine if g is not None), start=torch.zeros(()))
        if placements.get(name) is not None or not _same(total, expected, floor):
            return Verdict(problem=f"the gradient of {name} differs")
        if (
            not isinstance(unit.get_submodule(name.rpartition(".")[0]), ThinLinear)
            or name.endswith("bias")
            or not any(key.startswith(name.rpartition(".")[0] + ".") for key in placements)
        ):
            summed.add(name)
    return Verdict(frozenset(summed))


def _all_same(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> bool:
    return len(found) == len(expected) and all(map(_same, found, expected))


def _same(found: Tensor | None, expected: Tensor | None, floor: float = 0.0) -> bool:
    if found is None or expected is None:
        other = found if expected is None else expected
        return other is None or not bool(other.any())
    if found.shape != expected.shape:
        return False
    error = (found - expected).norm().item() if found.numel() else 0.0
    return bool(error <= _TOLERANCE * max(expected.norm().item(), floor, 1e-12))
