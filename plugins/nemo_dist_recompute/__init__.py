"""Activation checkpointing: keep fewer activations, and recompute layers during the backward."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import attrs

from nemo_dist import Stage, UnknownNameError, hookimpl
from nemo_dist.planning.validation import near
from nemo_dist.plugin.options import one_of, options

if TYPE_CHECKING:
    from torch import nn

SCOPES = ("all", "language", "vision", "audio", "multimodal")
_KEEPS = {
    "full": "only the inputs of every layer are kept",
    "selective": "attention, collectives and every second matmul are kept, the rest is recomputed",
}


def _scopes(value: Any) -> tuple[str, ...]:
    """Return the scopes that *value* names: one name, several joined by ``,`` or ``+``, or an iterable of names."""
    given = [value] if isinstance(value, str) else list(value) if isinstance(value, Iterable) else [value]
    if not all(isinstance(name, str) for name in given):
        raise TypeError(f"activation_checkpointing_scope must be a name or a list of names (got {value!r})")
    names = [part.strip().lower() for text in given for part in text.replace("+", ",").split(",")]
    for name in names:
        if name not in SCOPES:
            valid = ", ".join(SCOPES)
            raise UnknownNameError(
                f"activation_checkpointing_scope must name some of {valid} (got {name!r}){near(name, SCOPES)}"
            )
    scopes = tuple(dict.fromkeys(names))
    if not scopes or ("all" in scopes and len(scopes) > 1):
        raise ValueError(f"activation_checkpointing_scope must be 'all' or some of {SCOPES[1:]} (got {value!r})")
    return scopes


@options(plugin="recompute")
class RecomputeConfig:
    """What to recompute.

    ``mode``: "full" keeps only the inputs of every layer; "selective" also keeps what is expensive to recompute:
    attention, collectives and every second matmul (the policy is that of torchtitan). ``scope``: in a model of several
    towers, those whose layers are recomputed: "all", or one or more of "language", "vision", "audio" and "multimodal"
    (every tower but the language model), as in NeMo AutoModel. Raises ValueError for an unknown name.
    """

    mode: str = attrs.field(default="full", validator=one_of(("full", "selective")))
    scope: tuple[str, ...] = attrs.field(default=("all",), converter=_scopes)


@attrs.frozen(eq=False)
class Recompute:
    """Recompute layers during the backward; gradients are bit for bit the same."""

    name: ClassVar[str] = "recompute"
    config_type: ClassVar[type] = RecomputeConfig
    stage: ClassVar[int] = Stage.RECOMPUTE
    axes: ClassVar[frozenset[str]] = frozenset()
    composes_with: ClassVar[frozenset[str]] = frozenset()

    config: RecomputeConfig = attrs.field(factory=RecomputeConfig)

    @hookimpl
    def shard(self, parts: list[nn.Module]) -> None:
        from nemo_dist_recompute.apply import recompute

        for part in parts:
            recompute(part, self.config)

    @hookimpl
    def explain(self, model: nn.Module | None) -> str:
        scope = "" if self.config.scope == ("all",) else f" in the {' and '.join(self.config.scope)} layers"
        layers = ""
        if model is not None:
            from nemo_dist_recompute.apply import kinds

            layers = f" of {kinds(model)}"
        return f"recompute ({self.config.mode}){layers}: {_KEEPS[self.config.mode]}{scope}"
