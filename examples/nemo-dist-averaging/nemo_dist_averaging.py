"""A strategy in one file: every rank holds the whole model and averages each gradient as it is made."""

import attrs

from nemo_dist import Stage, hookimpl


@attrs.frozen
class AveragingConfig:
    """There is nothing to choose."""

    plugin = "averaging"


@attrs.frozen(eq=False)
class Averaging:
    """Replicate the model; average every gradient with its own all-reduce."""

    name, config_type, stage = "averaging", AveragingConfig, Stage.DATA
    axes, composes_with = frozenset({"dp_shard"}), frozenset()

    config: AveragingConfig = attrs.field(factory=AveragingConfig)

    @hookimpl
    def wrap(self, parts, mesh):
        import torch.distributed as dist

        def average(parameter):
            if mesh.size("dp") > 1:
                dist.all_reduce(parameter.grad, group=mesh.group("dp"))
                parameter.grad /= mesh.size("dp")

        for parameter in parts[0].parameters():
            parameter.register_post_accumulate_grad_hook(average)

    @hookimpl
    def explain(self, plan):
        return f"averaging: {plan.size('dp')} replicas, one all-reduce for every gradient"
