"""A package from elsewhere whose plugins each have one fault, of the kinds that authors of plugins are known for."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import attrs

from nemo_dist import Role, RuntimePart, Stage, View, hookimpl
from nemo_dist.planning.mesh_plan import Axis
from nemo_dist.plugin.protocol import asked_for


def planted(name: str, **attributes: Any) -> Any:
    """Give a class the name, options and attributes of a plugin."""

    def decorate(cls: type) -> type:
        kind = attrs.make_class(f"{name.title()}Config", {}, frozen=True, class_body={"plugin": name, "__doc__": "-"})
        for attribute, value in {"name": name, "config_type": kind, **attributes}.items():
            setattr(cls, attribute, value)
        cls.__annotations__ = {"config": kind}
        cls.config = attrs.field(factory=kind)
        return attrs.frozen(cls, eq=False)

    return decorate


class Strategy:
    """What a strategy declares here."""

    stage = Stage.DATA
    axes = frozenset({"dp_shard"})
    composes_with: frozenset[str] = frozenset()
    contract = 1


class Beside:
    """What a plugin beside a strategy declares here."""

    stage = Stage.COMPILE
    axes: frozenset[str] = frozenset()
    composes_with = frozenset({"fsdp2", "ddp"})
    contract = 1


class Averaging(Strategy):
    """Hold the whole model on every rank, and average each gradient when it is there."""

    @hookimpl
    def wrap(self, parts, mesh):
        from nemo_dist_planted_modules import average

        average(parts[0], self.group(mesh), self.divisor(mesh), self.left_out)

    left_out = ""

    def group(self, mesh):
        return mesh.group(Role.TOKENS)

    def divisor(self, mesh):
        return mesh.size(Role.TOKENS)

    @hookimpl
    def explain(self, plan):
        return f"{self.name}: {plan.size('dp')} replicas"


@planted("sound")
class Sound(Averaging):
    """Average gradients, without a fault."""


# ---- what a class declares ----


@planted("another")
class Misnamed(Averaging):
    """Be called otherwise than the entry point."""


@planted("late", stage=75)
class Late(Beside):
    """Act after the strategy."""


@planted("first", stage="first")
class First(Beside):
    """Act at a stage that is no number."""


@planted("worded", axes="dp_shard")
class Worded(Beside):
    """Claim letters."""


@planted("future", contract=99)
class Future(Averaging):
    """Be written for a contract that is yet to come."""


# ---- hooks that do not fit ----


@planted("misspelled")
class Misspelled(Beside):
    """Implement what is no hook."""

    @hookimpl
    def warp(self, parts):
        pass


@planted("unmarked")
class Unmarked(Strategy):
    """Forget the mark of a hook, and so train without averaging."""

    def wrap(self, parts, mesh):
        from nemo_dist_planted_modules import average

        average(parts[0], mesh.group(Role.TOKENS), mesh.size(Role.TOKENS), "")


@planted("defaulted")
class Defaulted(Beside):
    """Give a hook's argument a default."""

    @hookimpl
    def wrap(self, parts, mesh=None):
        pass


@planted("misargued")
class Misargued(Beside):
    """Name an argument that the hook has not."""

    @hookimpl
    def wrap(self, parts, meshes):
        pass


@planted("greedy")
class Greedy(Beside):
    """Take whatever there is."""

    @hookimpl
    def wrap(self, **everything):
        pass


@planted("hasty")
class Hasty(Beside):
    """Ask to be called first."""

    @hookimpl(tryfirst=True)
    def wrap(self, parts):
        pass


# ---- hooks that say the wrong thing ----


@planted("bare")
class Bare(Beside):
    """Refuse in a bare sentence."""

    @hookimpl
    def validate(self):
        return "a bare sentence"


@planted("moody")
class Moody(Beside):
    """Judge the same plan differently each second time."""

    asked = 0

    @hookimpl
    def validate(self):
        Moody.asked += 1
        return [] if Moody.asked % 2 else ["not today"]

    @hookimpl
    def explain(self):
        return "moody: as it likes"


@planted("by_rank")
class ByRank(Beside):
    """Refuse on one rank only."""

    @hookimpl
    def validate(self):
        return ["not here; run somewhere else"] if os.environ.get("RANK") == "1" else []


@planted("views_by_rank", axes=frozenset({"vp"}))
class ViewsByRank(Beside):
    """Plan another mesh on another rank."""

    @hookimpl
    def views(self, sizes, world_size):
        size = sizes.extra.get("vp", 1)
        if world_size % size:
            return None
        axes = (Axis("vp", size), Axis("vp_rest", world_size // size))
        return [View("vp_view", axes[:: -1 if os.environ.get("RANK") == "1" else 1])]


@planted("silent")
class Silent(Averaging):
    """Fail to explain."""

    @hookimpl
    def explain(self, plan):
        raise KeyError("dp_shards")


@planted("mapping")
class Mapped(Beside):
    """Return a dict for a RuntimePart."""

    @hookimpl
    def runtime(self):
        return {"no_sync": None}


@planted("returning")
class Returning(Beside):
    """Return the parts that it should edit."""

    @hookimpl
    def shard(self, parts):
        return list(parts)


@planted("batchless")
class Batchless(Beside):
    """Edit the batch in place and return nothing."""

    @hookimpl
    def runtime(self):
        return RuntimePart(batch=lambda batch: None)


# ---- wrong numbers ----


@planted("ring", axes=frozenset({"cp"}), stage=Stage.CONTEXT)
class Ring(Beside):
    """Split the sequence beside the plugin that does so already."""


@planted("summed")
class Summed(Averaging):
    """Forget to divide."""

    def divisor(self, mesh):
        return 1


@planted("alone")
class Alone(Averaging):
    """Average over a group of one rank."""

    def group(self, mesh):
        return None


@planted("partial")
class Partial(Averaging):
    """Leave one parameter out."""

    left_out = "model.layers.1.mlp.up_proj.weight"


@planted("shards_only", axes=frozenset({"dp_shard", "dp_replicate"}))
class ShardsOnly(Averaging):
    """Claim replicas, and average within each of them only."""

    def group(self, mesh):
        return mesh.group("dp_shard")

    def divisor(self, mesh):
        return mesh.size("dp_shard")


@planted("everybody", composes_with=frozenset({"tp"}))
class Everybody(Averaging):
    """Average over all ranks, also over those that hold other shards."""

    def group(self, mesh):
        import torch.distributed as dist

        return dist.group.WORLD

    def divisor(self, mesh):
        import torch.distributed as dist

        return dist.get_world_size()


@planted("forgetful_export")
class ForgetfulExport(Averaging):
    """Drop a parameter from the canonical state."""

    @hookimpl
    def export_state(self, state):
        state.pop("model.norm.weight", None)


@planted("permuting")
class Permuting(Averaging):
    """Hand out rows in another order, and take them back so: each alone looks right."""

    @hookimpl
    def export_state(self, state):
        _flip(state)

    @hookimpl
    def import_state(self, state):
        _flip(state)


@planted("permuting_import")
class PermutingImport(Averaging):
    """Take rows in another order than they were handed out."""

    @hookimpl
    def import_state(self, state):
        _flip(state)


def _flip(state):
    name = "model.layers.0.self_attn.q_proj.weight"
    if name in state:
        state[name] = state[name].flip(0)


@planted("leaking")
class Leaking(Averaging):
    """Make process groups for every runtime and keep them."""

    @hookimpl
    def runtime(self):
        import torch.distributed as dist

        for _ in range(20):
            dist.new_group([0, 1])


@planted("drifting_load")
class DriftingLoad(Averaging):
    """Shift a replica a little on one rank, after the load."""

    @hookimpl
    def runtime(self, parts):
        from nemo_dist_planted_modules import shift_on_rank_one

        shift_on_rank_one(parts[0])


@planted("failing")
class Failing(Averaging):
    """Raise in a step, on one rank."""

    @hookimpl
    def runtime(self):
        from nemo_dist_planted_modules import fail_on_rank_one

        return RuntimePart(after_backward=fail_on_rank_one)


@planted("counting_twice")
class CountingTwice(Averaging):
    """Add the gradients of earlier batches once more, with every further batch."""

    @hookimpl
    def wrap(self, parts, mesh):
        from nemo_dist_planted_modules import accumulate_twice

        accumulate_twice(parts[0], mesh.group(Role.TOKENS), mesh.size(Role.TOKENS))


@planted("dropping_rows")
class DroppingRows(Averaging):
    """Leave the last row of a batch out."""

    @hookimpl
    def runtime(self):
        return RuntimePart(batch=_without_last_row)


def _without_last_row(batch):
    return {name: value[:-1] if hasattr(value, "shape") else value for name, value in batch.items()}


@planted("overlapping", axes=frozenset({"parts"}))
class Overlapping(Beside):
    """Let ranks account for parts of the labels that overlap, so that some tokens count twice."""

    roles = {"parts": Role.SEQUENCE}

    @hookimpl
    def runtime(self, mesh):
        return RuntimePart(batch=partial(_own_labels, mesh.rank("parts"), mesh.size("parts")))


def _own_labels(rank, size, batch):
    labels = batch["labels"]
    own = labels.new_full(labels.shape, -100)
    mine = slice(rank * labels.shape[1] // size, (rank + 1) * labels.shape[1] // size + 1)
    own[:, mine] = labels[:, mine]
    return {**batch, "labels": own}


@planted("stale")
class Stale(Averaging):
    """Compute with the weights of the step before."""

    @hookimpl
    def runtime(self, parts):
        from nemo_dist_planted_modules import compute_with_old_weights

        compute_with_old_weights(parts[0].model.layers[0].mlp.down_proj)


@planted("hiding_moments")
class HidingMoments(Averaging):
    """Keep a moment of the optimizer to itself, where no checkpoint sees it."""

    @hookimpl
    def runtime(self):
        from nemo_dist_planted_modules import hide_moments

        return RuntimePart(optimizer=hide_moments)


@planted("drifting_norm")
class DriftingNorm(Averaging):
    """Step the last norm a little differently on one rank."""

    @hookimpl
    def runtime(self, parts):
        from nemo_dist_planted_modules import drift

        return RuntimePart(optimizer=partial(drift, parts[0].model.norm.weight))


@planted("untying")
class Untying(Averaging):
    """Give the output head a weight of its own where it is tied to the embedding."""

    @hookimpl
    def wrap(self, parts, mesh):
        from nemo_dist_planted_modules import average, untie

        untie(parts[0])
        average(parts[0], mesh.group(Role.TOKENS), mesh.size(Role.TOKENS), "")


@planted("one_axis", composes_with=frozenset({"cp"}))
class OneAxis(Averaging):
    """Average over the ranks that read different rows, and not over those that have other parts of them."""

    def group(self, mesh):
        return mesh.group(Role.BATCH)

    def divisor(self, mesh):
        return mesh.size(Role.BATCH)


@planted("seeing_shards")
class SeeingShards(Beside):
    """Scale what a layer gets by the share of features that a rank sees: all of them, but under tp."""

    @hookimpl
    def shard(self, parts):
        from nemo_dist_planted_modules import scale_by_features

        scale_by_features(parts)


@planted("elsewhere")
class Elsewhere(Averaging):
    """Need a device that no machine has; this one is sound."""

    @hookimpl
    def shard(self):
        raise RuntimeError("strategy 'elsewhere' needs a device that is not here")


@planted("beside_elsewhere", composes_with=frozenset({"fsdp2", "elsewhere"}))
class BesideElsewhere(Beside):
    """Compose with a strategy that cannot run here; this one is sound too."""

    @hookimpl
    def explain(self):
        return "beside_elsewhere: nothing to do"


@planted("casting")
class Casting(Averaging):
    """Store the norms with half of their bits."""

    @hookimpl
    def wrap(self, parts, mesh):
        from nemo_dist_planted_modules import average, cast_norms

        cast_norms(parts[0])
        average(parts[0], mesh.group(Role.TOKENS), mesh.size(Role.TOKENS), "")


@planted("swapping")
class Swapping(Averaging):
    """Put the weights of two matrices in each other's place."""

    @hookimpl
    def wrap(self, parts, mesh):
        from nemo_dist_planted_modules import average, swap

        average(parts[0], mesh.group(Role.TOKENS), mesh.size(Role.TOKENS), "")
        swap(parts[0].model.layers[0].mlp)


@planted("thawing")
class Thawing(Averaging):
    """Train what the user froze."""

    @hookimpl
    def runtime(self, parts):
        parts[0].requires_grad_(True)


@planted("scaling")
class Scaling(Averaging):
    """Scale the loss, and leave gradients so."""

    @hookimpl
    def runtime(self):
        return RuntimePart(loss_scale=lambda: 2.0)


@planted("norm_twice")
class NormTwice(Averaging):
    """Add up the norm over ranks that hold the same parameters."""

    @hookimpl
    def runtime(self):
        return RuntimePart(norm_axes=("dp_shard",))


@planted("exporting_in_place")
class ExportingInPlace(Averaging):
    """Change the tensors that are trained to hand them out."""

    @hookimpl
    def export_state(self, state):
        for tensor in state.values():
            tensor.detach().mul_(1.5)


# ---- what only shows in the second look ----


@planted("averaging_late")
class AveragingLate(Strategy):
    """Average when the runtime has run all backwards, and never in a loop of the user's."""

    @hookimpl
    def runtime(self, parts, mesh):
        from nemo_dist_planted_modules import average_now

        return RuntimePart(after_backward=partial(average_now, list(parts[0].parameters()), mesh.group(Role.TOKENS)))

    @hookimpl
    def explain(self, plan):
        return f"{self.name}: {plan.size('dp')} replicas"


@planted("stepping_what_waits")
class SteppingWhatWaits(AveragingLate):
    """Average in the backward, and say nothing of what a paused one left."""

    @hookimpl
    def runtime(self, parts, mesh):
        from nemo_dist_planted_modules import Pausing

        return RuntimePart(no_sync=Pausing(parts[0], mesh.group(Role.TOKENS)).paused)


@planted("last_model")
class LastModel(AveragingLate):
    """Average the gradients of the model that was wrapped last, whichever is trained."""

    wrapped: Any = None

    @hookimpl
    def wrap(self, parts):
        type(self).wrapped = parts[0]

    @hookimpl
    def runtime(self, mesh):
        from nemo_dist_planted_modules import average_last

        return RuntimePart(after_backward=partial(average_last, type(self), mesh.group(Role.TOKENS)))


@planted("hooking_again")
class HookingAgain(Strategy):
    """Put a hook on every parameter for each runtime, and remove none."""

    @hookimpl
    def runtime(self, parts, mesh):
        from nemo_dist_planted_modules import divide_by, sum_now

        divide_by(parts[0], mesh.size(Role.TOKENS))
        return RuntimePart(after_backward=partial(sum_now, list(parts[0].parameters()), mesh.group(Role.TOKENS)))

    @hookimpl
    def explain(self, plan):
        return f"hooking_again: {plan.size('dp')} replicas"


@planted("learning_in_evaluation")
class LearningInEvaluation(Averaging):
    """Shift a weight in every forward without gradients."""

    @hookimpl
    def wrap(self, parts, mesh):
        from nemo_dist_planted_modules import average, shift_in_evaluation

        average(parts[0], mesh.group(Role.TOKENS), mesh.size(Role.TOKENS), "")
        shift_in_evaluation(parts[0].model.norm)


@planted("editing_batch")
class EditingBatch(Averaging):
    """Write into the tensors of the user, where it changes no number of this step."""

    @hookimpl
    def runtime(self):
        return RuntimePart(batch=_without_first_label)


def _without_first_label(batch):
    batch["labels"][:, 0] = -100  # the shift of labels leaves it out
    return batch


@planted("reseeding")
class Reseeding(Averaging):
    """Seed the random generator in every step."""

    @hookimpl
    def runtime(self):
        from nemo_dist_planted_modules import seed

        return RuntimePart(after_backward=seed)


@planted("switching_mode")
class SwitchingMode(Averaging):
    """Put the model into training mode, which is the user's to say."""

    @hookimpl
    def runtime(self, parts):
        parts[0].train()


@planted("wordy")
class Wordy(Averaging):
    """Measure in words."""

    @hookimpl
    def runtime(self):
        return RuntimePart(metrics=lambda: {"loss": "low"})


@planted("lingering")
class Lingering(Averaging):
    """Start a thread for every runtime, and end none."""

    @hookimpl
    def runtime(self):
        from nemo_dist_planted_modules import linger

        linger()


@planted("regrouping")
class Regrouping(Averaging):
    """Make the optimizer anew, of one group."""

    @hookimpl
    def runtime(self):
        from nemo_dist_planted_modules import regroup

        return RuntimePart(optimizer=regroup)


@planted("deaf")
class Deaf(Averaging):
    """Show groups of options that the optimizer does not step by."""

    @hookimpl
    def runtime(self):
        from nemo_dist_planted_modules import Deafened

        return RuntimePart(optimizer=Deafened)


@planted("reconfiguring")
class Reconfiguring(Averaging):
    """Write what is true of this run alone into the model's configuration."""

    @hookimpl
    def wrap(self, parts, mesh):
        from nemo_dist_planted_modules import average

        average(parts[0], mesh.group(Role.TOKENS), mesh.size(Role.TOKENS), "")
        parts[0].config.max_position_embeddings *= 2


@planted("adding_a_buffer")
class AddingABuffer(Averaging):
    """Keep a counter in the model, of one rank, that is saved with it."""

    @hookimpl
    def wrap(self, parts, mesh):
        from nemo_dist_planted_modules import add_buffer_on_rank_one, average

        average(parts[0], mesh.group(Role.TOKENS), mesh.size(Role.TOKENS), "")
        add_buffer_on_rank_one(parts[0])


@planted("freezing_to_explain")
class FreezingToExplain(Averaging):
    """Change the model that it is asked about."""

    @hookimpl
    def explain(self, plan, model):
        if model is not None:
            model.get_input_embeddings().requires_grad_(False)
        return f"{self.name}: {plan.size('dp')} replicas"


@planted("blind_in_evaluation")
class BlindInEvaluation(Averaging):
    """Compute something else in every forward without gradients."""

    @hookimpl
    def wrap(self, parts, mesh):
        from nemo_dist_planted_modules import average, double_in_evaluation

        average(parts[0], mesh.group(Role.TOKENS), mesh.size(Role.TOKENS), "")
        double_in_evaluation(parts[0].model.norm)


@planted("own_adamw")
class OwnAdamW(Averaging):
    """Hand out an AdamW, whatever it is given."""

    @hookimpl
    def runtime(self):
        from nemo_dist_planted_modules import own_adamw

        return RuntimePart(optimizer=own_adamw)


@planted("losing_momentum")
class LosingMomentum(Averaging):
    """Make the optimizer anew, and forget how it remembers gradients."""

    @hookimpl
    def runtime(self):
        from nemo_dist_planted_modules import without_momentum

        return RuntimePart(optimizer=without_momentum)


@planted("losing_betas")
class LosingBetas(Averaging):
    """Make an AdamW anew, and forget its betas."""

    @hookimpl
    def runtime(self):
        from nemo_dist_planted_modules import without_betas

        return RuntimePart(optimizer=without_betas)


@planted("refusing_sgd")
class RefusingSGD(Averaging):
    """Take no SGD; this one is sound."""

    @hookimpl
    def runtime(self):
        from nemo_dist_planted_modules import refuse_sgd

        return RuntimePart(optimizer=refuse_sgd)


@planted("leaving_training")
class LeavingTraining(Averaging):
    """Put the model into evaluation mode in every step, which only shows in a model that is in training."""

    @hookimpl
    def runtime(self, parts):
        return RuntimePart(after_backward=parts[0].eval)


@planted("entering_training")
class EnteringTraining(Averaging):
    """Put the model into training mode as it is loaded."""

    @hookimpl
    def wrap(self, parts, mesh):
        from nemo_dist_planted_modules import average

        average(parts[0], mesh.group(Role.TOKENS), mesh.size(Role.TOKENS), "")
        parts[0].train()


@planted("seeding_loads")
class SeedingLoads(Averaging):
    """Seed the random generator as a model is loaded."""

    @hookimpl
    def wrap(self, parts, mesh):
        from nemo_dist_planted_modules import average, seed

        average(parts[0], mesh.group(Role.TOKENS), mesh.size(Role.TOKENS), "")
        seed()


@planted("caching_by_name")
class CachingByName(Averaging):
    """Keep the weight of the last norm after a step for the next forward, by name: one for the whole process."""

    @hookimpl
    def wrap(self, parts, mesh):
        from nemo_dist_planted_modules import average, compute_with_cached

        average(parts[0], mesh.group(Role.TOKENS), mesh.size(Role.TOKENS), "")
        compute_with_cached(parts[0].model.norm)

    @hookimpl
    def runtime(self, parts):
        from nemo_dist_planted_modules import cache

        return RuntimePart(optimizer=partial(cache, parts[0].model.norm))


@planted("second_axis", axes=frozenset({"parts", "shares"}))
class SecondAxis(Beside):
    """Let ranks account for labels along two axes; along the second they overlap."""

    roles = {"parts": Role.SEQUENCE, "shares": Role.SEQUENCE}

    @hookimpl
    def runtime(self, mesh):
        split = {axis: (mesh.rank(axis), mesh.size(axis)) for axis in ("parts", "shares") if axis in mesh.wide()}
        return RuntimePart(batch=partial(_own_of_two, split))

    @hookimpl
    def explain(self):
        return "second_axis: labels along two axes"


def _own_of_two(split, batch):
    for axis, (rank, size) in split.items():
        labels = batch["labels"]
        own = labels.new_full(labels.shape, -100)
        mine = slice(rank * labels.shape[1] // size, (rank + 1) * labels.shape[1] // size + (axis == "shares"))
        own[:, mine] = labels[:, mine]
        batch = {**batch, "labels": own}
    return batch


@planted(
    "selective_unseen", composes_with=frozenset({"activation_checkpointing", "activation_checkpointing:selective"})
)
class SelectiveUnseen(Averaging):
    """Forget to divide where operations are recomputed selectively."""

    selective: Any = None

    @hookimpl
    def validate(self, plugins):
        type(self).selective = asked_for(plugins, "activation_checkpointing:selective")
        return []

    def divisor(self, mesh):
        return 1 if self.selective else mesh.size(Role.TOKENS)


@planted("summing_adapters", composes_with=frozenset({"adapters"}))
class SummingAdapters(Averaging):
    """Sum the gradients of what was added after loading once more."""

    @hookimpl
    def runtime(self, parts, mesh):
        from nemo_dist_planted_modules import sum_now

        added = [parameter for name, parameter in parts[0].named_parameters() if "lora_" in name]
        return RuntimePart(after_backward=partial(sum_now, added, mesh.group(Role.TOKENS)))


@planted("promising", composes_with=frozenset({"compile", "tp_fast"}))
class Promising(Averaging):
    """Say that it composes with what is not to be had."""


# ---- state that ranks do not share ----


@planted("sharded_moments")
class ShardedMoments(Averaging):
    """Step each parameter on one rank only, and show the optimizer of all of them."""

    @hookimpl
    def runtime(self):
        from nemo_dist_planted_modules import step_own

        return RuntimePart(optimizer=partial(step_own, False))


@planted("owned_moments")
class OwnedMoments(Averaging):
    """Step each parameter on one rank only, and list on each rank only its own: this one is sound."""

    @hookimpl
    def runtime(self):
        from nemo_dist_planted_modules import step_own

        return RuntimePart(optimizer=partial(step_own, True))


@planted("consolidating")
class Consolidating(Averaging):
    """Shard the optimizer state with torch's own class, which shows none of it."""

    @hookimpl
    def runtime(self):
        from nemo_dist_planted_modules import zero_redundancy

        return RuntimePart(optimizer=zero_redundancy)


@planted("local", exact=False, replicas_differ=True)
class Local(Strategy):
    """Train replicas apart and average them every second step; its replicas differ by design, and it says so."""

    @hookimpl
    def runtime(self, parts, mesh):
        from nemo_dist_planted_modules import Replica

        return Replica(parts[0], mesh.group(Role.TOKENS), mesh.size(Role.TOKENS)).part()

    @hookimpl
    def explain(self, plan):
        return f"local: {plan.size('dp')} replicas that meet every second step"


@planted("local_unsaid")
class LocalUnsaid(Local):
    """Train replicas apart and say nothing of it."""

    exact = True
    replicas_differ = False


@planted("local_lost", exact=False, replicas_differ=True)
class LocalLost(Local):
    """Train replicas apart, and keep none of them in a checkpoint."""

    @hookimpl
    def runtime(self, parts, mesh):
        from nemo_dist_planted_modules import Replica

        return attrs.evolve(Replica(parts[0], mesh.group(Role.TOKENS), mesh.size(Role.TOKENS)).part(), state=None)


@planted("halving", exact=False)
class Halving(Averaging):
    """Send gradients with half of their bits, which is inexact by design."""

    @hookimpl
    def wrap(self, parts, mesh):
        from nemo_dist_planted_modules import average

        average(parts[0], mesh.group(Role.TOKENS), mesh.size(Role.TOKENS), "", halved=True)
