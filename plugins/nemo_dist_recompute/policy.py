"""List the operators whose results selective activation checkpointing keeps."""

from __future__ import annotations

from collections import Counter
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
    """Within *kept*, return copies of the results of ``topk``, because routers scale what they chose in place.

    torch.compile takes no other contexts for a layer that recomputes than modes like this one.
    """

    def __init__(self, kept: Any) -> None:
        make: Any = super().__init__  # torch leaves it untyped
        make()
        self._kept = kept

    def __enter__(self) -> Any:
        self._kept.__enter__()
        enter: Any = super().__enter__
        return enter()

    def __exit__(self, *failure: Any) -> None:
        leave: Any = super().__exit__
        leave(*failure)
        self._kept.__exit__(*failure)

    @property
    def ac_graph_id(self) -> Any:
        """The number that torch.compile gives the layer, by which *kept* marks what is computed in it."""
        return self._kept.ac_graph_id

    @ac_graph_id.setter
    def ac_graph_id(self, number: int) -> None:
        self._kept.ac_graph_id = number

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        return tuple(part.clone() for part in found) if function is torch.ops.aten.topk.default else found


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
    return tuple(map(_Copies, contexts)) if routed else contexts
