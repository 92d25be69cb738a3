"""Make the parts of a model tensor-parallel: match the plan, refuse what does not fit, cut."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from nemo_dist.errors import TopologyError
from nemo_dist.mesh.store_consensus import meet
from nemo_dist_tensor.collectives import Peers
from nemo_dist_tensor.surgery import Surgery
from nemo_dist_tensor.tp_plan import Rules, match, problems

if TYPE_CHECKING:
    from nemo_dist.mesh.mesh_context import MeshContext
    from nemo_dist_tensor import TensorConfig


def parallelise(parts: list[nn.Module], mesh: MeshContext, config: TensorConfig) -> None:
    """Cut the *parts*, transformers models on meta, in place; raise TopologyError (a ValueError) with every reason."""
    peers = Peers.along(mesh["tp"])
    stage, experts = mesh.pp_size > 1, mesh.ep_size > 1
    matched = [match(part, config.tp_plan or {}, stage=stage, skip_experts=experts) for part in parts]
    found = _unused(matched, mesh)
    if not stage:  # a stage of a pipeline need not have a block
        found += [problem for part, rules in zip(parts, matched, strict=True) for problem in problems(part, rules)]
    if found:
        raise TopologyError(found)
    for part, rules in zip(parts, matched, strict=True):
        Surgery(part, rules, peers, config.sequence_parallel).run()


def _unused(matched: list[Rules], mesh: MeshContext) -> list[str]:
    """Say which of the user's rules name nothing in any part, on any stage of a pipeline."""
    hints = {rule: hint for rules in matched for rule, hint in rules.unused.items()}
    mine = sorted(rule for rule in hints if all(rule in rules.unused for rules in matched))
    if mesh.pp_size > 1:
        mine = meet("the tensor-parallel plan", mine, lambda lists: sorted(set.intersection(*map(set, lists))))
    return [
        f"tp_plan has a rule for {rule!r}, which names no module or parameter of the model{hints.get(rule, '')}"
        for rule in mine
    ]
