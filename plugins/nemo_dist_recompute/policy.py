"""List the operators whose results selective activation checkpointing keeps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from nemo_dist.torch_private import FUNCTIONAL_COLLECTIVES, TorchDispatchMode

# Every second one is kept, as in torchtitan, which halves both their memory and their recomputation.
_MATMULS = (
    "aten::mm",
    "aten::addmm",
    "aten::_grouped_mm",
    "aten::_scaled_mm",
    "aten::_scaled_grouped_mm",
)
_ALWAYS = (
    f"{FUNCTIONAL_COLLECTIVES}::all_gather_into_tensor",
    f"{FUNCTIONAL_COLLECTIVES}::all_reduce",
    f"{FUNCTIONAL_COLLECTIVES}::all_to_all_single",
    f"{FUNCTIONAL_COLLECTIVES}::reduce_scatter_tensor",
    "aten::topk",  # recomputed, a router might choose other experts
)


def _operators(names: tuple[str, ...]) -> frozenset[Any]:
    """Return the default overloads of the operators *names* that this build of torch has."""
    found = set()
    for name in names:
        namespace, _, operator = name.partition("::")
        packet = getattr(getattr(torch.ops, namespace), operator, None)
        if packet is not None:
            found.add(packet.default)
    return frozenset(found)


class _Copies(TorchDispatchMode):
    """Return copies of the result of ``topk``, because routers scale the weights that they chose in place."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        return tuple(part.clone() for part in found) if function is torch.ops.aten.topk.default else found


@contextmanager
def _copying(kept: AbstractContextManager[Any]) -> Iterator[None]:
    mode: Any = _Copies  # torch leaves its constructor untyped
    with kept, mode():
        yield


@cache
def is_attention(operator: Any) -> bool:
    """Whether *operator* is a fused attention, by its name: torch's kernels, flex attention, or those of a package.

    Packages name their operators, or the namespace of these, after it: ``flash_attn::_flash_attn_varlen_forward``.
    """
    name: str = operator.name()
    return "attention" in name or "attn" in name


def selective_contexts(routed: bool = False) -> Any:
    """Return the two contexts, for the forward and for the recomputation of one layer, that keep the listed results.

    ``routed``: the layer may have experts, and the router's choice is kept.
    """
    matmuls, always = _operators(_MATMULS), _operators(_ALWAYS)
    # The forward and the recomputation count separately, so that both decide the same for each matmul.
    seen: Counter[bool] = Counter()

    def keep(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if operator in matmuls:
            seen[context.is_recompute] += 1
            kept = seen[context.is_recompute] % 2 == 1
        else:
            kept = operator in always or is_attention(operator)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts: Any = create_selective_checkpoint_contexts(keep)
    return tuple(map(_copying, contexts)) if routed else contexts
