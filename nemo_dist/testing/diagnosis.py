"""Guess from the numbers of two trainings what an author should look at first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nemo_dist.plugin.protocol import declared
from nemo_dist.setup.setup import DistributedSetup
from nemo_dist.testing.equivalence import TOLERANCE, Outcome

_ALIKE = 1e-3  # how far the factors of parameters may lie apart to be called one


def hints(found: Outcome, expected: Outcome, build: Mapping[str, Any], world: int) -> list[str]:
    """Return what the differences of *found* from *expected* hint at, the likeliest first; often nothing."""
    said = [_of_dtype(build, world), _of_factor(found, expected), _of_losses(found, expected)]
    return [hint for hint in said if hint]


def _of_dtype(build: Mapping[str, Any], world: int) -> str:
    strategy = DistributedSetup.build(**build, world_size=world).strategy
    dtype = declared(strategy, "compute_dtype")
    if strategy is None or dtype in (None, "float32"):
        return ""
    return f"strategy {strategy.name!r} computes in {dtype} here; select it with mp_policy in float32 for a comparison"


def _of_factor(found: Outcome, expected: Outcome) -> str:
    """Say by which one factor all gradients are too large, if so, or how few of them are wrong."""
    names = sorted(expected.gradients.keys() & found.gradients.keys())
    pairs = {name: (found.gradients[name].double(), expected.gradients[name].double()) for name in names}
    pairs = {name: pair for name, pair in pairs.items() if pair[0].shape == pair[1].shape and pair[1].norm() > 0}
    wrong = [name for name, (a, b) in pairs.items() if (a - b).norm() > TOLERANCE * b.norm()]
    factors = [_factor(*pairs[name]) for name in wrong]
    if not wrong:
        return ""
    known = [factor for factor in factors if factor is not None]
    if len(known) == len(wrong) and max(known) - min(known) <= _ALIKE * abs(known[0]):
        which = "every gradient is" if len(wrong) == len(pairs) else f"{len(wrong)} gradients, such as {wrong[0]}, are"
        return (
            f"{which} {known[0]:.4g} times that of one process: summed where it is averaged, or the other way round; "
            "strategies divide by mesh.size(Role.TOKENS)"
        )
    if len(wrong) < len(pairs) / 2:
        return f"only {len(wrong)} of {len(pairs)} gradients are wrong: {', '.join(wrong[:3])}"
    return ""


def _factor(found: Tensor, expected: Tensor) -> float | None:
    factor = float((found * expected).sum() / (expected * expected).sum())
    rest = torch.linalg.vector_norm(found - factor * expected)
    return factor if float(rest) <= _ALIKE * float(expected.norm()) else None


def _of_losses(found: Outcome, expected: Outcome) -> str:
    wrong = [step for step, (a, b) in enumerate(zip(found.losses, expected.losses, strict=False)) if not _close(a, b)]
    if not wrong:
        return "all losses are right" if found.losses else ""
    if wrong[0] == 0:
        return "the first loss is wrong, before any gradient: look at batch, shard, wrap and at forwards"
    return f"the loss is right until step {wrong[0]}: look at gradients, the optimizer hook and stale weights"


def _close(one: float, other: float) -> bool:
    return abs(one - other) <= TOLERANCE * abs(other)
