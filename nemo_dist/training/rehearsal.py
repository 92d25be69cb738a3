"""Run a weightless copy of a model twice, and find the first module whose outputs for the same tokens differ.

A token's outputs may depend on other tokens by attention only, if sequences are to be split or packed. Convolutions,
recurrent states and pooled tokens are found by running tokens with and without their neighbours: no list of model
families is needed, and the user's own config is what runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from nemo_dist.hf_model import accepts, class_name, has_own_code
from nemo_dist.loading.formula_weights import FormulaWeights, weightless
from nemo_dist.torch_private import storage_id, tensors_in
from nemo_dist.training.fixed_draws import FixedDraws, repeatable
from nemo_dist.training.router_aux_loss import SWITCH

TOLERANCE = 1e-4  # relative; models compute norms and router probabilities in float32
_SEQUENCES = (5, 7)  # lengths of the sequences that are packed into one row
_READ = "_nemo_dist_read_from_outside"  # in the model's __dict__


@attrs.frozen(kw_only=True, eq=False)
class Run:
    """What a forward gave: ``output`` is the model's; ``outputs`` those of its modules, by name, in order of their end.

    Only outputs of shape (rows, length, ...) are kept; ``shape`` is that of the tokens.
    """

    output: Any
    outputs: Mapping[str, list[Tensor]]
    shape: torch.Size


@attrs.define(eq=False)
class Rehearsal:
    """A weightless copy of a model, to run on a few tokens."""

    model: Any
    weights: FormulaWeights
    draws: FixedDraws = attrs.field(factory=FixedDraws)

    @classmethod
    def of(cls, model: nn.Module) -> Rehearsal:
        """Return a rehearsal of the class and config of *model*, in evaluation; its weights are not read."""
        copy: Any = weightless(model)
        for config in (copy.config, copy.config.get_text_config()):
            if hasattr(config, SWITCH):
                setattr(config, SWITCH, False)  # a loss that is no mean over tokens
        return cls(copy, FormulaWeights(copy))

    @torch.no_grad()
    def run(self, inputs: Mapping[str, Any]) -> Run:
        """Run the copy on *inputs*, tokens or embeddings (rows, length, ...) and what is beside them, without a cache.

        In training it draws as ``draws`` say; see ``FixedDraws``.
        """
        given = {**inputs, "use_cache": False} if accepts(self.model, "use_cache") else inputs
        shape = (inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"]).shape[:2]
        with ExitStack() as stack:
            stack.enter_context(repeatable(self.draws, self.model.training))
            stack.enter_context(torch.device("cpu"))
            outputs = stack.enter_context(_recording(self.model, shape))
            stack.enter_context(self.weights)
            output = self.model(**given)
        return Run(output=output, outputs=outputs, shape=shape)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Within the context the copy is in training."""
        self.model.train()
        try:
            yield
        finally:
            self.model.eval()

    def culprit(self, name: str) -> str:
        """Return how a message calls the module *name*: its name and class."""
        return f"{name}, {class_name(self.model.get_submodule(name))}"


def first_difference(whole: Run, part: Run, index: Tensor, counted: Tensor | None = None) -> str | None:
    """Return the name of the first module that gave the tokens of *part* other outputs than in *whole*, or None.

    ``index``: the places in *whole* of the tokens of *part*. ``counted`` (rows, length of the part): compare these.
    """
    for name, tensors in whole.outputs.items():
        others = part.outputs.get(name, [])
        if len(others) == len(tensors) and not all(
            same(ours.index_select(1, index), theirs, counted) for ours, theirs in zip(tensors, others, strict=True)
        ):
            return name
    logits, own = _result(whole.output), _result(part.output)
    return None if same(logits.index_select(1, index), own, counted) else ""


def per_token(run: Run) -> bool:
    """Whether the model gave an output for each token."""
    return _result(run.output).shape[:2] == run.shape


def _result(output: Any) -> Tensor:
    """Return what a model is called for: its logits, or the hidden states of one without a head."""
    found: Tensor = output.logits if "logits" in output else output.last_hidden_state
    return found


def same(expected: Tensor, found: Tensor, counted: Tensor | None = None) -> bool:
    """Whether two tensors of (rows, length, ...) are equal up to rounding where *counted* is True; NaN is not."""
    if expected.shape != found.shape:
        return False
    if counted is not None:
        expected, found = expected[counted], found[counted]
    if not expected.is_floating_point():
        return torch.equal(expected, found)
    error = (expected.double() - found.double()).norm()
    return bool(error <= TOLERANCE * expected.double().norm())


def mixes_packed_sequences(model: Any) -> str | None:
    """Return where *model* lets packed sequences see each other, the first module or an error; None if nowhere."""
    first, second = _SEQUENCES
    tokens = torch.arange(1, first + second + 1)[None] % model.config.get_text_config().vocab_size
    positions = torch.cat((torch.arange(first), torch.arange(second)))[None]
    if not accepts(model, "position_ids"):
        return "a forward that takes no position_ids"
    try:
        rehearsal = Rehearsal.of(model)
        packed = rehearsal.run({"input_ids": tokens, "position_ids": positions})
        alone = rehearsal.run({"input_ids": tokens[:, first:], "position_ids": positions[:, first:]})
    except Exception as error:  # whatever a forward of any family raises
        return f"a forward that cannot be checked: {type(error).__name__}: {error}"
    name = first_difference(packed, alone, torch.arange(first, first + second))
    return None if name is None else rehearsal.culprit(name)


def read_from_outside(model: Any) -> frozenset[str]:
    """Return the names of the modules of which an operation takes a weight while the module itself does not run.

    Told of models with the user's own code, and only where they can be run on tokens alone.
    """
    if not has_own_code(model):
        return frozenset()
    if _READ not in vars(model):
        try:
            vars(model)[_READ] = _read_from_outside(Rehearsal.of(model))
        except Exception:  # whatever a forward of any family raises
            vars(model)[_READ] = frozenset()
    found: frozenset[str] = vars(model)[_READ]
    return found


def _read_from_outside(rehearsal: Rehearsal) -> frozenset[str]:
    model = rehearsal.model
    names = {storage_id(parameter): name for name, parameter in model.named_parameters()}
    running: list[str] = []
    found: set[str] = set()

    def read(tensors: list[Tensor]) -> None:
        for name in filter(None, (names.get(storage_id(tensor)) for tensor in tensors)):
            parts = name.split(".")
            found.update({".".join(parts[:end]) for end in range(1, len(parts))}.difference(running))

    def ended(*_: Any) -> None:
        running.pop()

    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, of=name: running.append(of))
        module.register_forward_hook(ended)
    rehearsal.weights.on_read = read
    tokens = {"input_ids": torch.arange(sum(_SEQUENCES))[None] % model.config.get_text_config().vocab_size}
    rehearsal.run(tokens)
    with suppress(Exception), rehearsal.training():  # whatever a forward raises there
        rehearsal.run(tokens)
    return frozenset(found)


@contextmanager
def _recording(model: nn.Module, shape: torch.Size) -> Iterator[dict[str, list[Tensor]]]:
    """Within the context, keep the first output of every module of *model*, if its first dims are *shape*."""
    outputs: dict[str, list[Tensor]] = {}

    def keep(name: str, module: nn.Module, args: Any, output: Any) -> None:
        tensors = tensors_in(output if not isinstance(output, dict) else list(output.values()))
        if tensors and tensors[0].ndim > 2 and tensors[0].shape[:2] == shape:
            outputs.setdefault(name, []).append(tensors[0])

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name:
                stack.enter_context(_hook(module, partial(keep, name)))
        yield outputs


@contextmanager
def _hook(module: nn.Module, function: Any) -> Iterator[None]:
    handle = module.register_forward_hook(function)
    try:
        yield
    finally:
        handle.remove()
