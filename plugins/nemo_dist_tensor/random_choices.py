"""Find what a model chooses at random in training, which tensor-parallel ranks would choose differently.

A copy with random weights runs in training. A module that draws several numbers, as dropout does, chooses. One that
draws a single number between 0 and 1 may leave a layer out, with a probability that may be 0: it gets the largest one,
in a second run the least one, and chooses if the outputs differ. What is drawn by other generators than torch's, those
of numpy or Python, is found in the code.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from nemo_dist.torch_private import TorchDispatchMode, disable_current_modes, tensors_in
from nemo_dist.training.forward_code import chances
from nemo_dist.training.rehearsal import same
from nemo_dist_tensor.probe import short_model
from nemo_dist_tensor.tp_plan import generic

_NAMES = re.compile("drop|jitter|noise")
_LARGEST = 1 - 2.0**-20


def random_problems(model: Any) -> list[str]:
    """Say what *model* (on meta) chooses at random in training, and which options of its config turn that off."""
    choices, complete = _choices(model, model.config)
    if not choices:
        return _by_code(model) if complete else _by_name(model)
    options = _options_to_clear(model, len(choices))
    way_out = f"set {', '.join(options)} to 0 in the model's config" if options else "use tp_size=1, and fsdp2"
    return [
        f"{generic(choices[0]) or 'the model'} chooses at random in training, and tensor-parallel ranks would choose "
        f"differently; {way_out}"
    ]


def _by_code(model: nn.Module) -> list[str]:
    found = {
        generic(".".join((*filter(None, [chance.name]), *chance.path)))
        for chance in chances(model)
        if isinstance(chance.value, float) and chance.value > 0
    }
    return [
        f"{name} is compared with a random number in training, and tensor-parallel ranks would draw another; set it to "
        "0 in the model's config"
        for name in sorted(found)
    ]


def _by_name(model: nn.Module) -> list[str]:
    found = {
        f"{generic(name)}.{option}"
        for name, module in model.named_modules()
        for option, value in vars(module).items()
        if (_NAMES.search(option) or isinstance(module, nn.Dropout)) and isinstance(value, float) and value > 0
    }
    return [
        f"{name} seems to be the probability of a random choice, and tensor-parallel ranks would choose differently; "
        "set it to 0 in the model's config"
        for name in sorted(found)
    ]


def _options_to_clear(model: Any, count: int) -> list[str]:
    """Return the options that have to be 0 in the config for *model* to make none of its *count* choices, if any help.

    They are floating-point numbers on which nothing depends in evaluation, set or with a default in the model's code.
    """
    config, cleared = copy.deepcopy(model.config), list[str]()
    while count:
        for option in [*_numbers(config), *_unset(model, config)]:
            changed = _with_zero(config, option)
            left = len(_choices(model, changed)[0])
            if left < count and not _differ(_Run.of(model, config), _Run.of(model, changed)):
                config, count = changed, left
                cleared.append(option)
                break
        else:
            return []
    return cleared


def _numbers(config: Any, prefix: str = "") -> Iterator[str]:
    """Yield the names of the floating-point options of *config* above 0, those of a part as ``part.option``."""
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            yield from _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, float) and value > 0:
            yield prefix + name


def _unset(model: nn.Module, config: Any) -> list[str]:
    """Return the options without a value that constructors of *model* ask for by name, as ``getattr`` does."""
    constructors = [inspect.unwrap(vars(kind)["__init__"]) for kind in type(model).__mro__ if "__init__" in vars(kind)]
    words = [word for one in constructors for word in getattr(getattr(one, "__code__", None), "co_consts", ())]
    return [word for word in words if isinstance(word, str) and word.isidentifier() and not hasattr(config, word)]


def _with_zero(config: Any, option: str) -> Any:
    """Return *config* with *option*, a name of ``_numbers``, set to 0."""
    changed = copy.deepcopy(config)
    *parts, name = option.split(".")
    holder = changed
    for part in parts:
        holder = getattr(holder, part)
    setattr(holder, name, 0.0)
    return changed


def _choices(model: Any, config: Any) -> tuple[list[str], bool]:
    """Return the modules of *model*, with *config*, that choose at random, in order, and whether the run went through.

    A module is named once for each time.
    """
    run = _Run.of(model, config, _LARGEST)
    matters = run.drew and _differ(run, _Run.of(model, config, 0.0))
    return run.chose + (run.drew if matters else []), run.complete


@attrs.frozen(eq=False)
class _Run:
    """A forward of a copy of a model, by the names of its modules in the order of their ends: what each returned first.

    ``chose``: the modules that drew several numbers, in order. ``drew``: those that drew a single one. ``complete``:
    the run went through.
    """

    outputs: Mapping[str, list[Tensor]]
    chose: list[str]
    drew: list[str]
    complete: bool

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, config: Any, number: float | None = None) -> _Run:
        """Run a copy of *model* with *config*: in training, where a single draw gives *number*, or in evaluation."""
        outputs: dict[str, list[Tensor]] = {}
        running, complete = [""], True
        draws = _Draws(running, number or 0.0)
        with disable_current_modes(), torch.random.fork_rng(devices=[]), torch.device("cpu"):
            try:
                twin, inputs = short_model(model, config)
                for name, module in twin.named_modules():
                    module.register_forward_pre_hook(lambda *_, of=name: running.append(of))
                    module.register_forward_hook(lambda *call: _keep(outputs, running.pop(), call[-1]))
                with draws:
                    twin.train(number is not None)(**inputs)
            except Exception:  # whatever a forward of any family raises, or an option of 0
                complete = False
        return cls(outputs, draws.several, draws.single, complete)


def _keep(outputs: dict[str, list[Tensor]], name: str, output: Any) -> None:
    tensors = tensors_in(list(output.values()) if isinstance(output, dict) else output)
    outputs.setdefault(name, [tensor.nan_to_num() for tensor in tensors])  # a copy, as code may add to it in place


def _differ(one: _Run, other: _Run) -> bool:
    """Whether a module gave other outputs in *other* than in *one*, or ran in one of them only."""
    pairs = [(tensors, other.outputs.get(name, [])) for name, tensors in one.outputs.items()]
    return one.outputs.keys() != other.outputs.keys() or not all(
        len(a) == len(b) and all(map(same, a, b)) for a, b in pairs
    )


class _Draws(TorchDispatchMode):
    """Within the context, note which module draws, the last of *running*; a single draw of [0, 1) gives *number*."""

    def __init__(self, running: list[str], number: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._running = running
        self._number = number
        self.several: list[str] = []
        self.single: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = torch.get_rng_state()
        found = function(*args, **(kwargs or {}))
        if torch.equal(before, torch.get_rng_state()) or isinstance(found, nn.Parameter):
            return found  # what a module that the forward makes draws for its weights is no choice
        if isinstance(found, Tensor) and found.numel() == 1 and function.overloadpacket is torch.ops.aten.rand:
            found.fill_(self._number)
            self.single.append(self._running[-1])
        elif "bernoulli" in function.name() or any((tensor != tensor.max()).any() for tensor in tensors_in(found)):
            self.several.append(self._running[-1])  # others give equal numbers only where they are of no width
        return found
