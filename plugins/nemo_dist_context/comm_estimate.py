"""Estimate what context parallelism sends in a step."""

from __future__ import annotations

from nemo_dist import MeshPlan
from nemo_dist.plugin.comm_estimate import ModelFacts, Traffic, shared
from nemo_dist_context.config import ContextConfig


def traffic(plan: MeshPlan, facts: ModelFacts | None, config: ContextConfig) -> list[Traffic]:
    """Return the exchanges of attention, with the bytes of one rank."""
    ranks = plan.size("cp")
    if ranks == 1:
        return []
    forward = backward = None
    if facts is not None:
        forward = _sent(ranks, plan.size("tp"), facts, config) // plan.size("pp")
        reached = facts.reached_blocks / facts.blocks if facts.blocks else 0
        backward = round(forward * reached)
        if config.method == "ring":  # keys and values go round again, and their gradients, in float32, all the way home
            backward += 4 * backward * ranks // (ranks - 1) // facts.computed
        forward += round(forward * reached) if facts.recomputes else 0
    what, ways = "keys and values", ("all-gather", "reduce-scatter")
    if config.method == "ulysses":
        what, ways = "queries, keys, values and outputs", ("all-to-all", "all-to-all")
    if config.method == "ring":
        ways = ("all-to-all", "all-to-all")
    first = Traffic(axis="cp", collective=ways[0], of=what, often="in the forward of every block", sent=forward)
    second = Traffic(axis="cp", collective=ways[1], of=f"gradients of {what}", often="in its backward", sent=backward)
    return [first, second]


def _sent(ranks: int, tensor_ranks: int, facts: ModelFacts, config: ContextConfig) -> int:
    """Return the bytes that a rank sends in one forward of all blocks."""
    heads, key_heads = facts.heads // tensor_ranks, max(1, facts.key_heads // tensor_ranks)
    token = facts.head_width * facts.computed * facts.blocks
    if config.method == "ulysses":
        copied = key_heads if key_heads % ranks == 0 else ranks
        return shared(ranks, facts.tokens / ranks * 2 * (heads + copied) * token)
    return shared(ranks, facts.tokens * 2 * key_heads * token)
