"""A package from elsewhere: small plugins that use one point of the contract each, found by their entry points."""

from __future__ import annotations

from functools import partial
from typing import Any

import attrs

from nemo_dist import Role, RuntimePart, Stage, hookimpl
from nemo_dist.hf_model import inner_model
from nemo_dist.plugin.resharding import reshard_with


def config(plugin: str, **fields: Any) -> type:
    """Make the options of *plugin*: a frozen value."""
    return attrs.make_class(f"{plugin.title()}Config", fields, frozen=True, class_body={"plugin": plugin})


class Declared:
    """What every plugin here declares, unless it says otherwise."""

    stage = Stage.COMPILE
    axes: frozenset[str] = frozenset()
    composes_with: frozenset[str] = frozenset({"fsdp2", "ddp"})
    contract = 1


# ---- two that want to run the batches, and two that want to present the model ----


def plugin(name: str, options: type | None = None, **attributes: Any) -> Any:
    """Give a class the name, options and attributes of a plugin."""

    def decorate(cls: type) -> type:
        kind = options or config(name)
        for attribute, value in {"name": name, "config_type": kind, **attributes}.items():
            setattr(cls, attribute, value)
        cls.__annotations__ = {"config": kind}
        cls.config = attrs.field(factory=kind)
        return attrs.frozen(cls, eq=False)

    return decorate


@plugin("runner")
class Runner(Declared):
    """Run the batches."""

    @hookimpl
    def runtime(self, parts):
        return RuntimePart(engine=partial(_run, parts[0]))


@plugin("second_runner")
class SecondRunner(Declared):
    """Run the batches too."""

    @hookimpl
    def runtime(self, parts):
        return RuntimePart(engine=partial(_run, parts[0]))


def _run(model, batches, weights):
    total = 0.0
    for batch, weight in zip(batches, weights, strict=True):
        loss = model(**batch).loss * weight
        loss.backward()
        total = total + loss.detach()
    return total


@attrs.define(eq=False)
class Presented:
    """What a presenter returns."""

    parts: list[Any]


@plugin("presenter")
class Presenter(Declared):
    """Return something else than the model."""

    @hookimpl
    def present(self, parts):
        return Presented(parts)


@plugin("second_presenter")
class SecondPresenter(Declared):
    """Return something else, too."""

    @hookimpl
    def present(self, parts):
        return Presented(parts)


# ---- one that replaces the forward of every layer, by hand, and counts ----

CALLS: list[str] = []


@plugin("counted", stage=25)
class Counted(Declared):
    """Count the forwards of the layers."""

    @hookimpl
    def shard(self, parts):
        for part in parts:
            for name, layer in inner_model(part).named_modules():
                if type(layer).__name__.endswith("DecoderLayer"):
                    layer.forward = partial(_counted, name, layer.forward)


def _counted(name, forward, *args, **kwargs):
    CALLS.append(name)
    return forward(*args, **kwargs)


# ---- wrappers in the place of the model: before the strategy, and as a strategy ----


@plugin("wrapped_early", stage=45)
class WrappedEarly(Declared):
    """Put a module around the model that hands everything through, before the strategy shards it."""

    @hookimpl
    def shard(self, parts):
        from nemo_dist_outside_modules import Around

        parts[:] = [Around(part) for part in parts]


@plugin("wrapped", stage=Stage.DATA, axes=frozenset({"dp_shard"}))
class Wrapped(Declared):
    """Replicate with torch's own DistributedDataParallel around the model."""

    @hookimpl
    def wrap(self, parts, mesh):
        from torch.nn.parallel import DistributedDataParallel

        parts[:] = [DistributedDataParallel(part, process_group=mesh.group(Role.TOKENS)) for part in parts]

    @hookimpl
    def runtime(self, parts):
        return RuntimePart(no_sync=parts[0].no_sync)


# ---- axes of its own: one that splits the sequence, one whose ranks share a batch, one that splits the batch ----


@plugin("split_labels", axes=frozenset({"labels"}), composes_with=frozenset({"fsdp2", "ddp"}))
class SplitLabels(Declared):
    """Let every rank of ``labels`` account for its part of every sequence's labels."""

    roles = {"labels": Role.SEQUENCE}

    @hookimpl
    def runtime(self, mesh):
        return RuntimePart(batch=partial(_own_labels, mesh.rank("labels"), mesh.size("labels")))


def _own_labels(rank, size, batch):
    labels = batch["labels"]
    own = labels.new_full(labels.shape, -100)
    mine = slice(rank * labels.shape[1] // size, (rank + 1) * labels.shape[1] // size)
    own[:, mine] = labels[:, mine]
    return {**batch, "labels": own}


@plugin("sharing", axes=frozenset({"sharing"}), composes_with=frozenset({"fsdp2", "ddp"}))
class Sharing(Declared):
    """Have the ranks of ``sharing`` compute the same thing."""

    roles = {"sharing": Role.PARAMETERS}


@plugin("islands", axes=frozenset({"islands"}), composes_with=frozenset({"fsdp2", "ddp"}))
class Islands(Declared):
    """Replicate over ``islands``, outside of everything else."""

    roles = {"islands": Role.BATCH}


# ---- one with state, which takes part in the backward, the norm, zero_grad and the end ----


@plugin("scaled", options=config("scaled", scale=attrs.field(default=1024.0), of_rank=attrs.field(default=False)))
class Scaled(Declared):
    """Scale the loss in the backward, and remember an average of the gradients."""

    @hookimpl
    def runtime(self, parts):
        from nemo_dist_outside_modules import Memory

        return Memory.of(parts, self.config).part()


# ---- options of its own, and a feature that it says it has ----


@plugin(
    "tuned",
    options=config("tuned", enable_compile=attrs.field(default=True), fuses=attrs.field(default=False)),
    composes_with=frozenset(),
)
class Tuned(Declared):
    """Have an option that is called like one of somebody else's."""

    @property
    def features(self):
        return {"compile": "fuses=True"} if self.config.fuses else {}


# ---- one that gathers, and says how its shards come back ----

RESHARDED: list[str] = []


@plugin("gathering")
class Gathering(Declared):
    """Note when shards are to come back."""

    @hookimpl
    def shard(self, parts):
        for part in parts:
            reshard_with(inner_model(part), partial(RESHARDED.append, "resharded"))
