"""Estimate what tensor-parallel ranks send each other in a step, by following the plan as the forwards do.

torch is imported only when there is a model, so that planning needs none. The sums mirror ``layers`` and
``parallel_regions``: change a collective there, and change its line here; ``tests/test_traffic.py`` compares both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeGuard

import attrs

from nemo_dist.plugin.comm_estimate import Traffic, shared
from nemo_dist_tensor.styles import COLUMN, GATHERED, ROW, WHOLE_INPUT
from nemo_dist_tensor.tp_plan import Rules, is_key_value

if TYPE_CHECKING:
    from torch import nn

    from nemo_dist.planning.mesh_plan import MeshPlan
    from nemo_dist.plugin.comm_estimate import ModelFacts
    from nemo_dist_tensor.block_structure import Blocks

Kind = tuple[str, str, str]

# (collective, of, often) of every kind, in the order in which they are listed.
SUM_OUTPUTS = ("all-reduce", "outputs of row-wise projections and of the embedding", "in the forward")
GATHER_INPUTS = ("all-gather", "the tokens that attention and feed-forward read", "in the forward")
SCATTER_OUTPUTS = ("reduce-scatter", "their outputs", "in the forward")
JOIN_OUTPUTS = ("all-gather", "outputs that the plan wants whole", "in the forward")
LOSS = ("all-reduce", "3 numbers per token, for the loss", "in the forward")
SUM_GRADIENTS = ("all-reduce", "gradients of what column-wise projections read", "in the backward")
GATHER_GRADIENTS = ("all-gather", "gradients of those outputs", "in the backward")
SCATTER_GRADIENTS = ("reduce-scatter", "gradients of those tokens", "in the backward")
SUM_PARAMETERS = ("all-reduce", "gradients of parameters that every rank has whole", "in the backward")
JOIN_GRADIENTS = ("all-gather", "gradients of whole inputs that row-wise projections cut", "in the backward")
KINDS = (
    SUM_OUTPUTS,
    GATHER_INPUTS,
    SCATTER_OUTPUTS,
    JOIN_OUTPUTS,
    LOSS,
    SUM_GRADIENTS,
    GATHER_GRADIENTS,
    SCATTER_GRADIENTS,
    JOIN_GRADIENTS,
    SUM_PARAMETERS,
)

_LOSS_NUMBERS = 3  # of a token, in float32: the greatest logit, the sum of exponentials, the label's own
_LOSS_BYTES = 4


def unmeasured(sequence: bool) -> list[Traffic]:
    """Return the kinds of collectives that every model has, without bytes."""
    inside = (GATHER_INPUTS, SCATTER_OUTPUTS) if sequence else ()
    back = (GATHER_GRADIENTS, SCATTER_GRADIENTS, SUM_PARAMETERS) if sequence else ()
    kinds = (SUM_OUTPUTS, *inside, LOSS, SUM_GRADIENTS, *back)
    return [entry(kind, None) for kind in kinds]


def measured(model: Any, rules: Rules, plan: MeshPlan, facts: ModelFacts, sequence: bool) -> list[Traffic]:
    """Return the collectives of *model* with the bytes that one rank sends, averaged over pipeline stages."""
    sums: Counter[Kind] = Counter()
    for kind, amount in Step(model, rules, plan, facts, sequence).collectives():
        twice = 2 if kind[0] == "all-reduce" else 1
        sums[kind] += twice * shared(plan.size("tp"), amount) // plan.size("pp")
    return [entry(kind, sums[kind]) for kind in KINDS if kind in sums]


def entry(kind: tuple[str, str, str], sent: int | None) -> Traffic:
    """Return the entry for *kind* along tp."""
    collective, what, often = kind
    return Traffic(axis="tp", collective=collective, of=what, often=often, sent=sent)


@attrs.frozen(eq=False)
class Step:
    """One training step of *model*, as the list of its tensor-parallel collectives."""

    model: Any
    rules: Rules
    plan: MeshPlan
    facts: ModelFacts
    sequence: bool

    def collectives(self) -> Iterator[tuple[Kind, float]]:
        """Yield the kind of every collective and the bytes of the whole tensor that it works on."""
        from nemo_dist_tensor.block_structure import Blocks

        blocks = Blocks.of(self.model, self.rules)
        for name, style in self.rules.modules.items():
            yield from self._outside(name, self.model.get_submodule(name), style)
        if self.sequence:
            yield from self._between(blocks)
        for region, exit_rule in blocks.exits().items():
            yield from self._region(blocks, region, exit_rule)

    @property
    def _tokens(self) -> float:
        """The tokens of this rank's part of the sequence, all of which a region computes."""
        return self.facts.tokens / self.plan.size("cp")

    @property
    def _pieces(self) -> float:
        """The bytes of hidden states that a gather or scatter works on, with the padding to equal pieces."""
        ranks, length = self.plan.size("tp"), self.facts.length / self.plan.size("cp")
        return self.facts.rows * -(-length // ranks) * ranks * self.facts.hidden * self.facts.computed

    def _again(self, last: bool) -> int:
        """Return how often a collective of a forward runs: recomputation repeats all but the last one of a block."""
        return 2 if self.facts.recomputes and not last else 1

    def _outside(self, name: str, module: nn.Module, style: str) -> Iterator[tuple[Kind, float]]:
        """Yield what embedding, head and single parameters cost, whatever region they are in."""
        hidden = self._tokens * self.facts.hidden * self.facts.computed
        if style == "embedding_rowwise":
            yield SUM_OUTPUTS, hidden
        elif style == "embedding_colwise":
            yield JOIN_OUTPUTS, hidden
        elif style in COLUMN and module is self.model.get_output_embeddings():
            yield LOSS, self._tokens * _LOSS_NUMBERS * _LOSS_BYTES
            if not all(trained.startswith(f"{name}.") for trained in self.facts.trained_names):
                yield SUM_GRADIENTS, hidden
        elif style == "replicated_with_grad_allreduce" or self._stays_whole(name, style):
            yield from self._parameters(module)

    def _parameters(self, module: nn.Module) -> Iterator[tuple[Kind, float]]:
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad:
                yield SUM_PARAMETERS, parameter.numel() * self.facts.computed

    def _stays_whole(self, name: str, style: str) -> bool:
        return style == "colwise" and is_key_value(name) and self.facts.key_heads % self.plan.size("tp") != 0

    def _between(self, blocks: Blocks) -> Iterator[tuple[Kind, float]]:
        """Yield what sharding the tokens costs outside of regions: at both ends of the blocks, and for the norms."""
        if blocks.follow(self.facts.first_trained):
            yield GATHER_GRADIENTS, self._pieces  # of the first block's input
        yield GATHER_INPUTS, self._pieces  # of the last block's output, not recomputed
        for _, module in blocks.between():
            yield from self._parameters(module)

    def _region(self, blocks: Blocks, region: str, exit_rule: str | None) -> Iterator[tuple[Kind, float]]:
        """Yield the collectives at both ends of attention or feed-forward, and those of the rules inside it."""
        styles, once = blocks.styles_in(region), not blocks.recomputed(region, self.facts.first_trained)
        reads, gives = blocks.reached(region, self.facts.trained_names, self.facts.first_trained)
        again, times = self._again(last=once), self._again(last=once or blocks.ends_its_block(region))
        if self.sequence:
            yield GATHER_INPUTS, self._pieces * again
        if reads and COLUMN & set(styles.values()):
            whole = self._tokens * self.facts.hidden * self.facts.computed
            yield (SCATTER_GRADIENTS, self._pieces) if self.sequence else (SUM_GRADIENTS, whole)
        for name, style in styles.items():
            module = self.model.get_submodule(name)
            if gives and style in WHOLE_INPUT and _is_linear(module):
                yield JOIN_GRADIENTS, self._tokens * module.in_features * self.facts.computed
            if self.sequence and name == exit_rule:
                yield from self._exit(module, times, gives)
            else:
                yield from self._inside(module, style, times, again, gives)
        if gives and self.sequence and exit_rule is None:
            yield GATHER_GRADIENTS, self._pieces

    def _exit(self, module: nn.Module, times: int, gives: bool) -> Iterator[tuple[Kind, float]]:
        """Yield what the projection that ends a region costs when each rank keeps its own tokens of the sum."""
        yield SCATTER_OUTPUTS, self._pieces * times
        if gives:
            yield GATHER_GRADIENTS, self._pieces
        if _is_linear(module) and module.bias is not None and module.bias.requires_grad:
            yield SUM_PARAMETERS, module.bias.numel() * self.facts.computed

    def _inside(
        self, module: nn.Module, style: str, times: int, again: int, gives: bool
    ) -> Iterator[tuple[Kind, float]]:
        one = self._tokens * self.facts.computed  # a number for each token
        if style in ROW and _is_linear(module):
            yield SUM_OUTPUTS, one * module.out_features * times
        elif style in GATHERED and _is_linear(module):
            yield JOIN_OUTPUTS, one * module.out_features * again
        elif style == "moe_tp_experts":  # a token's expert weights have partial gradients too
            chosen = getattr(self.model.config.get_text_config(), "num_experts_per_tok", 0)
            yield SUM_OUTPUTS, one * self.facts.hidden * times
            if gives:
                yield SUM_GRADIENTS, one * (self.facts.hidden + chosen)


def _is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    from torch import nn

    return isinstance(module, nn.Linear)
