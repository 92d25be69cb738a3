"""ZeRO stage 1: every rank holds the whole model, and the optimizer state of its share of the parameters."""

import attrs

from nemo_dist import Role, RuntimePart, Stage, hookimpl
from nemo_dist.plugin.comm_estimate import Traffic, shared


@attrs.frozen
class Zero1Config:
    """There is nothing to choose."""

    plugin = "zero1"


@attrs.frozen(eq=False)
class Zero1:
    """Replicate the model; average gradients; every rank steps its share of the parameters (ZeRO stage 1)."""

    name, config_type, stage = "zero1", Zero1Config, Stage.DATA
    axes, composes_with = frozenset({"dp_shard"}), frozenset({"cp", "activation_checkpointing"})

    config: Zero1Config = attrs.field(factory=Zero1Config)

    @hookimpl
    def wrap(self, parts, mesh):
        from nemo_dist_zero1.gradients import Averager

        # Ranks of cp hold the whole model too: TOKENS are all ranks that see different tokens.
        parts[0].zero1_averager = Averager.of(parts[0], mesh.group(Role.TOKENS))

    @hookimpl
    def runtime(self, parts, mesh):
        from nemo_dist_zero1.optimizer import share_state

        group = mesh.group(Role.TOKENS)
        if group is None:
            return None
        return RuntimePart(
            no_sync=parts[0].zero1_averager.paused,
            unreduced=parts[0].zero1_averager.unreduced,
            lockstep=True,  # every gradient is averaged as it is made, so all ranks must make the same ones
            optimizer=lambda optimizer: share_state(optimizer, group),
        )

    @hookimpl
    def explain(self, plan):
        ranks = plan.size("dp_cp")
        return f"zero1: {ranks} replicas, each with the optimizer state of 1/{ranks} of the parameters"

    @hookimpl
    def traffic(self, plan, facts):
        ranks = plan.size("dp_cp")
        if ranks == 1:
            return []
        sent = None if facts is None else shared(ranks, facts.trained * facts.stored)
        averaged = None if sent is None else 2 * sent
        return [
            Traffic(axis="dp_cp", collective="all-reduce", of="gradients", often="one by one", sent=averaged),
            Traffic(axis="dp_cp", collective="broadcast", of="parameters", often="after the step", sent=sent),
        ]
