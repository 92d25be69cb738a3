"""Estimate what expert parallelism sends in a step: tokens to their experts and back, and the shards of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nemo_dist.plugin.comm_estimate import Traffic, bytes_of, readable, shared
from nemo_dist_moe.config import BETWEEN

if TYPE_CHECKING:
    from nemo_dist import MeshPlan
    from nemo_dist.plugin.comm_estimate import ModelFacts
    from nemo_dist_moe.config import MoEParallelizerConfig

_COUNT = 8  # bytes of the number of tokens for one expert


def dispatch(plan: MeshPlan, facts: ModelFacts | None, config: MoEParallelizerConfig) -> list[Traffic]:
    """Return what the layers with experts send of their tokens, if every rank of ``ep`` gets equally many.

    With uneven routing some ranks send more and some less, but the sum over all ranks is the same.
    """
    ep, tp = plan.size("ep"), plan.size("tp")
    if facts is None:
        return _listed(ep, tp, config.dispatcher, (None, None, None, None), "")
    tokens = facts.tokens / plan.size("cp")
    layers = facts.expert_layers / plan.size("pp")
    backwards = layers - sum(experts > 0 for _, experts in facts.skipped) / plan.size("pp")
    forwards = layers + (backwards if facts.recomputes else 0)
    width = facts.hidden * facts.computed
    weights = facts.experts_per_token * facts.computed
    sent = shared(ep, tokens / tp * facts.experts_per_token * width)
    amounts = (
        round((2 * forwards + 2 * backwards) * sent),
        round(forwards * shared(ep, facts.experts * _COUNT)),
        round(forwards * shared(tp, tokens * width) + backwards * shared(tp, tokens * (width + weights))),
        round(2 * (forwards * shared(ep, tokens * width) + backwards * shared(ep, tokens * (width + weights)))),
    )
    held = f", of {facts.experts // ep} experts a rank, {readable(4 * sent)} a layer"
    return _listed(ep, tp, config.dispatcher, amounts, held)


def _listed(
    ep: int, tp: int, dispatcher: str, amounts: tuple[int | None, int | None, int | None, int | None], held: str
) -> list[Traffic]:
    tokens, counts, joined, added = amounts
    if dispatcher == "all_reduce":
        often = "once in the forward of every layer with experts, once in its backward"
        return [Traffic(axis="ep", collective="all-reduce", of="tokens", often=often, sent=added)]
    each = "in the forward of every layer with experts"
    often = f"twice {each}, twice in its backward{held}"
    found = [
        Traffic(axis="ep", collective="all-to-all", of="tokens", often=often, sent=tokens),
        Traffic(axis="ep", collective="all-to-all", of="numbers of tokens", often=f"once {each}", sent=counts),
    ]
    once = Traffic(
        axis="tp", collective="all-gather", of="tokens", often=f"once {each}, once in its backward", sent=joined
    )
    return [*found, once] if tp > 1 else found


def shards(plan: MeshPlan, facts: ModelFacts | None, config: MoEParallelizerConfig) -> list[Traffic]:
    """Return what ranks with shards of the same experts send each other of parameters and gradients."""
    between = plan.size(BETWEEN) if BETWEEN in plan.view_of("ep") else 1
    within = plan.size("ep_shard") // between
    gathered = reduced = averaged = None
    regathers = config.reshard_after_forward is not False
    if facts is not None:
        compute, reduction = _sizes(config.mp_policy, facts.computed)
        part = plan.size("ep") * plan.size("pp")
        again = facts.expert_parameters - sum(experts for _, experts in facts.skipped) if regathers else 0
        gathered = shared(within, (facts.expert_parameters + again) / part * compute)
        reduced = shared(within, facts.trained_experts / part * reduction)
        averaged = 2 * shared(between, facts.trained_experts / part * reduction / within)
    often = "once, and again in the backward" if regathers else "once"
    found = []
    if within > 1:
        found += [
            Traffic(axis="ep_shard", collective="all-gather", of="experts, by layer", often=often, sent=gathered),
            Traffic(
                axis="ep_shard", collective="reduce-scatter", of="gradients of experts", often="once", sent=reduced
            ),
        ]
    if between > 1:
        found.append(
            Traffic(
                axis="ep_shard",
                collective="all-reduce",
                of="gradient shards of experts",
                often="once, between replicas",
                sent=averaged,
            )
        )
    return found


def _sizes(policy: Any, computed: int) -> tuple[int, int]:
    """Return the bytes per number of an expert's parameter in a matmul, and of its gradient in a reduction."""
    if policy is None:
        return computed, bytes_of("float32")
    get = policy.get if isinstance(policy, Mapping) else lambda name: getattr(policy, name)
    names = [str(name).removeprefix("torch.") if name else None for name in map(get, ("param_dtype", "reduce_dtype"))]
    compute = bytes_of(names[0]) if names[0] else computed
    return compute, bytes_of(names[1]) if names[1] else compute
