"""The kinds of collectives that tensor-parallel ranks run in a step, and the modules that they cut; no torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from nemo_dist.plugin.comm_estimate import Traffic
from nemo_dist_tensor.tp_plan import Rules, generic

Kind = tuple[str, str, str]

# (collective, of, often) of every kind, in the order in which they are told.
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


def unmeasured(sequence: bool) -> list[Traffic]:
    """Return the kinds of collectives that every model has, without bytes."""
    inside = (GATHER_INPUTS, SCATTER_OUTPUTS) if sequence else ()
    back = (GATHER_GRADIENTS, SCATTER_GRADIENTS, SUM_PARAMETERS) if sequence else ()
    kinds = (SUM_OUTPUTS, *inside, LOSS, SUM_GRADIENTS, *back)
    return [entry(kind, None) for kind in kinds]


def entry(kind: tuple[str, str, str], sent: int | None) -> Traffic:
    """Return the entry of a *kind* along tp."""
    collective, what, often = kind
    return Traffic(axis="tp", collective=collective, of=what, often=often, sent=sent)


def described(rules: Rules) -> str:
    """Return the styles of *rules* and the modules and parameters that each is carried out on."""
    found: dict[str, dict[str, None]] = {}
    for name, style in {**rules.modules, **rules.parameters}.items():
        found.setdefault(style, {})[generic(name)] = None
    return "; ".join(f"{style}: {', '.join(_joined(names))}" for style, names in found.items())


def _joined(names: Mapping[str, None]) -> Iterator[str]:
    """Yield the *names*, those of one parent together: ``mlp.{gate_proj, up_proj}``."""
    parents: dict[str, list[str]] = {}
    for name in names:
        parent, _, own = name.rpartition(".")
        parents.setdefault(parent, []).append(own)
    for parent, children in parents.items():
        dot = "." if parent else ""
        yield f"{parent}{dot}{children[0]}" if len(children) == 1 else f"{parent}{dot}{{{', '.join(children)}}}"
