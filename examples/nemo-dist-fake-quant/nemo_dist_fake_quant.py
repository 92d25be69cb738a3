"""Train for low-precision inference: linear layers compute on inputs that are rounded to a few bits."""

import attrs

from nemo_dist import Stage, hookimpl
from nemo_dist.hf_model import blocks, inner_model
from nemo_dist.plugin.forwards import wrap_forward
from nemo_dist.plugin.options import integer, options


@options(plugin="fake_quant")
class FakeQuantConfig:
    """``bits``: of each input, signed; every token has a scale of its own."""

    bits: int = attrs.field(default=8, validator=integer(at_least=2))


@attrs.frozen(eq=False)
class FakeQuant:
    """Round the inputs of the linear layers in every block, token by token; gradients pass the rounding by."""

    # Between what splits matrices and what splits sequences, and before what recomputes or compiles the layers.
    name, config_type, stage = "fake_quant", FakeQuantConfig, Stage.TENSOR + 5
    axes, composes_with = frozenset(), frozenset({"fsdp2", "ddp"})
    exact = False  # not what one process computes without it

    config: FakeQuantConfig = attrs.field(factory=FakeQuantConfig)

    @hookimpl
    def validate(self, plan, sizes):
        ranks, problems = plan.size("tp"), []
        if ranks > 1:
            problems.append(
                f"fake_quant takes one scale per token, and each of {ranks} tp ranks sees a part; use tp_size=1"
            )
        if sizes.ep_size > 1:  # experts cannot compute in float64, in which the tests compare it
            problems.append(f"fake_quant is not proven with ep_size {sizes.ep_size}; use ep_size=1")
        return problems

    @hookimpl
    def shard(self, parts):
        for layer in linears(parts):
            wrap_forward(layer, self.rounded)

    def rounded(self, forward, inputs):
        """Run the *forward* of a linear layer on rounded *inputs*."""
        limit = 2 ** (self.config.bits - 1) - 1
        scale = inputs.detach().abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / limit
        rounded = (inputs.detach() / scale).round() * scale
        return forward(inputs + (rounded - inputs.detach()))

    @hookimpl
    def explain(self, model):
        count = "the" if model is None else len(linears([model]))
        return f"fake_quant: inputs of {count} linear layers rounded to {self.config.bits} bits, a scale for each token"


def linears(parts):
    """Return the linear layers in the blocks of all *parts*; the head is left out, as is usual."""
    from torch import nn

    found = (block.modules() for part in parts for block in blocks(inner_model(part)).values())
    return [module for modules in found for module in modules if isinstance(module, nn.Linear)]
