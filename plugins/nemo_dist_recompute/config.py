"""The options of recomputation; no torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import attrs

from nemo_dist import UnknownNameError
from nemo_dist.planning.validation import near, shown
from nemo_dist.plugin.options import one_of, options

SCOPES = ("all", "language", "vision", "audio", "multimodal")


def _scopes(value: Any) -> tuple[str, ...]:
    """Return the scopes that *value* names: one name, several joined by ``,`` or ``+``, or an iterable of names."""
    given = [value] if isinstance(value, str) else list(value) if isinstance(value, Iterable) else [value]
    if not all(isinstance(name, str) for name in given):
        raise TypeError(f"activation_checkpointing_scope must be a name or a list of names (got {shown(value)})")
    names = [part.strip().lower() for text in given for part in text.replace("+", ",").split(",")]
    for name in names:
        if name not in SCOPES:
            valid = ", ".join(SCOPES)
            raise UnknownNameError(
                f"activation_checkpointing_scope must name some of {valid} (got {shown(name)}){near(name, SCOPES)}"
            )
    scopes = tuple(dict.fromkeys(names))
    if not scopes or ("all" in scopes and len(scopes) > 1):
        raise ValueError(f"activation_checkpointing_scope must be 'all' or some of {SCOPES[1:]} (got {shown(value)})")
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
