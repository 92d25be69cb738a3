"""Context parallelism in place of the built-in one: parts of the sequence are exchanged for parts of the heads."""

import attrs

from nemo_dist import RuntimePart, Stage, hookimpl
from nemo_dist.hf_model import inner_model


@attrs.frozen
class UlyssesConfig:
    """There is nothing to choose."""

    plugin = "ulysses"


@attrs.frozen(eq=False)
class Ulysses:
    """Split causal sequences over cp; for attention every rank gets whole sequences and a share of the heads."""

    name, config_type, stage = "ulysses", UlyssesConfig, Stage.CONTEXT
    axes, composes_with = frozenset({"cp"}), frozenset()

    config: UlyssesConfig = attrs.field(factory=UlyssesConfig)

    @hookimpl
    def validate(self, plan):
        return [
            f"ulysses is not proven with {axis.name}_size {axis.size}; use 'context', or {axis.name}_size=1"
            for axis in plan.wide
            if axis.name in ("pp", "tp", "ep")
        ]

    @hookimpl
    def shard(self, parts, mesh):
        if mesh.size("cp") > 1:
            from nemo_dist_ulysses.judge import require_splittable
            from nemo_dist_ulysses.model import split_sequences

            model = inner_model(parts[0])
            require_splittable(model, mesh.size("cp"))
            split_sequences(model, mesh.group("cp"))

    @hookimpl
    def runtime(self, mesh):
        if mesh.size("cp") == 1:
            return None
        from nemo_dist_ulysses.batch import part_of

        return RuntimePart(batch=lambda batch: part_of(batch, mesh.size("cp"), mesh.rank("cp")))

    @hookimpl
    def explain(self, plan):
        ranks = plan.size("cp")
        return f"ulysses: sequences in {ranks} parts, all-to-all of heads" if ranks > 1 else "ulysses: cp_size is 1"
