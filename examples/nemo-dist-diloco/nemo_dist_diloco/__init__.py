"""DiLoCo: replicas train by themselves for some steps, and then an outer optimizer steps on how far they came."""

import attrs

from nemo_dist import Role, RuntimePart, Stage, hookimpl
from nemo_dist.hf_model import name_root
from nemo_dist.plugin.options import integer, options


@options(plugin="diloco")
class DiLoCoConfig:
    """``inner_steps``: between two outer ones. ``outer_lr``, ``outer_momentum``: of the outer SGD, with Nesterov.

    The defaults of the outer optimizer are those of the paper (arXiv:2311.08105), which takes some 500 inner steps.
    """

    inner_steps: int = attrs.field(default=8, validator=integer(at_least=1))
    outer_lr: float = attrs.field(default=0.7, converter=float, validator=attrs.validators.gt(0))
    outer_momentum: float = attrs.field(default=0.9, converter=float, validator=attrs.validators.ge(0))


@attrs.frozen(eq=False)
class DiLoCo:
    """Let replicas drift apart for some steps of the user's optimizer, then take one outer step together (DiLoCo)."""

    name, config_type, stage = "diloco", DiLoCoConfig, Stage.DATA
    axes, composes_with = frozenset({"dp_shard"}), frozenset({"activation_checkpointing"})
    replicas_differ = True  # so the core does not compare them
    exact = False  # not what one process computes

    config: DiLoCoConfig = attrs.field(factory=DiLoCoConfig)

    @hookimpl
    def wrap(self, parts, mesh):
        from nemo_dist_diloco.replica import Replica

        parameters = dict(name_root(parts[0]).named_parameters())
        parts[0].diloco = Replica.of(parameters, mesh.group(Role.TOKENS), mesh.rank(Role.TOKENS), self.config)

    @hookimpl
    def runtime(self, parts):
        replica = parts[0].diloco
        return RuntimePart(optimizer=replica.follow, state=replica.state(), metrics=replica.metrics)

    @hookimpl
    def export_state(self, state, parts):
        parts[0].diloco.export(state)

    @hookimpl
    def explain(self, plan):
        return f"diloco: {plan.size('dp')} replicas, one outer step after every {self.config.inner_steps} inner ones"
