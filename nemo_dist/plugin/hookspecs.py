"""The hooks that a plugin may implement: implement those you need, take the arguments you need.

A plugin is a small attrs class with the attributes of :class:`nemo_dist.Plugin` and methods marked ``@hookimpl``. Hooks
run during setup, loading and checkpointing, never in a training step: what a step needs from a plugin is the
:class:`RuntimePart` that its ``runtime`` hook returns.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import attrs
from pluggy import HookimplMarker, HookspecMarker

from nemo_dist.planning.validation import FrozenMapping

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from nemo_dist.mesh.mesh_context import MeshContext
    from nemo_dist.planning.mesh_plan import MeshPlan
    from nemo_dist.planning.sizes import ParallelismSizes
    from nemo_dist.planning.views import View
    from nemo_dist.plugin.comm_estimate import ModelFacts, Traffic
    from nemo_dist.plugin.memory_estimate import RankShare
    from nemo_dist.plugin.protocol import Plugin
    from nemo_dist.plugin.step_schedule import StepSchedule

hookspec = HookspecMarker("nemo_dist")
hookimpl = HookimplMarker("nemo_dist")

Batch = Mapping[str, Any]


@attrs.frozen(kw_only=True, eq=False)
class SavedState:
    """What a checkpoint contains of one plugin.

    ``tensors``: by kind and parameter name, sharded like the parameters of this run, whatever their layout was when
    saved; empty when passed to ``accepts``. ``shared``: the values that were equal on every rank. ``own``: the values
    that this rank saved; None when the topology has changed, as no saved rank corresponds to this one.
    """

    tensors: Mapping[str, Mapping[str, Tensor]] = attrs.field(factory=FrozenMapping)
    shared: Any = None
    own: Any = None


@attrs.frozen(kw_only=True, eq=False)
class PluginState:
    """The state of a plugin that is saved in checkpoints; leave out what you do not have.

    ``tensors`` returns tensors that are laid out like parameters (an outer momentum, the rounding error of a compressed
    gradient), by kind and parameter name. They are saved in the canonical layout, as an optimizer's moments are, so
    they load under any topology. ``shared`` returns plain values that are equal on every rank (a loss scale): None,
    numbers, text, tensors, and containers of them; a save fails when ranks differ. ``own`` returns plain values of this
    rank alone.

    ``accepts`` returns why a :class:`SavedState` cannot be loaded, or None; it is called before anything is changed.
    ``load`` restores it. Both are called on every rank.
    """

    tensors: Callable[[], Mapping[str, Mapping[str, Tensor]]] | None = None
    shared: Callable[[], Any] | None = None
    own: Callable[[], Any] | None = None
    accepts: Callable[[SavedState], str | None] | None = None
    load: Callable[[SavedState], None]


@attrs.frozen(kw_only=True, eq=False)
class RuntimePart:
    """What a training step needs of one plugin; leave out what you do not need. Parts act in the order of plugins.

    The batch:

    ``batch`` turns the batch of this data-parallel rank into what this rank computes on (a slice of the sequence, say).
    ``lockstep`` says that the forwards of ranks with different batches wait for each other in collectives, module by
    module, so that all ranks must run the same modules equally often.

    The backward:

    ``no_sync`` returns a context in which a backward does not reduce gradients, for gradient accumulation.
    ``unreduced`` returns the parameters with gradients that no backward has reduced yet, each with a function that
    drops those: the runtime refuses to clip or step them, and drops them with the optimizer's.
    ``loss_scale`` returns a factor that every loss is multiplied by before its backward; the loss that the user gets is
    without it, and gradients keep it until ``after_backward`` or ``before_clip`` of the same part removes it.
    ``after_backward`` runs once per ``forward_backward``, after the last backward.
    ``engine`` replaces the loop over the batches: it gets every batch, already changed by ``batch``, and one 0-dim
    float32 weight each. It runs forward and backward of ``sum(weight * loss)`` and returns that sum, detached, equal on
    every rank of its own axes. Only one plugin may provide an engine. ``survey`` runs only the forwards of the same
    batches, under ``torch.no_grad``, for losses that depend on all of them before the first backward.

    The loss:

    ``split_tokens`` returns this rank's part of a tensor with a value, or a vector, per token, (rows, length, ...),
    filled up with the number that it gets; ``join_tokens`` undoes it for the outputs of this rank: it gets a tensor and
    the length, and is differentiable, its backward summing the gradients of all ranks.
    ``forward_to_loss`` gets a function that runs a forward and makes a loss of its outputs; it calls it, and returns
    the loss on which the backward is to start. For a strategy that must know what the backward will reach.
    ``loss`` is a loss that the plugin's own options ask for, like one that a user gives to ``setup.runtime``.
    ``needs_loss`` says why the model's own loss cannot be computed here; where a loss is given it is not read.
    An engine that can compute a given loss takes it as its third argument, ``loss``: ``loss.inputs(batch)`` is what the
    model gets, ``loss(outputs, batch)`` returns a sum and a count, and the engine runs ``sum(weight * sum)``. It may
    cut batches by rows, all tensors alike; ``rows`` is how many it runs at once, 0 for all. ``measure`` runs only the
    forwards, under ``torch.no_grad``, and returns the total sum and count of a loss, a float64 tensor of two, equal on
    every rank of the plugin's own axes. ``forward`` runs the forward of one batch without gradients, and returns the
    outputs by name, on every rank of its own axes.

    The optimizer:

    ``optimizer`` takes the optimizer over the local parameters and returns the one that the user steps.
    ``before_clip`` runs before gradients are clipped. ``kept_gradients`` returns gradients that are stored outside of
    ``.grad`` (in buffers of the plugin, say): the norm includes them, and clipping scales them in place.
    ``norm_axes`` are the mesh axes along which ranks hold *different* parameters that no DTensor mesh spans, so that
    a global norm must be summed over them (``pp``). ``norm_skip`` are parameters whose gradient another rank includes.
    ``zero_grad`` runs after ``zero_grad`` of the user's optimizer.

    The run:

    ``metrics`` returns numbers by name about the steps since the last call; all ranks call it together, so it may run
    collectives. ``state`` is what checkpoints save of the plugin. ``close`` releases what the plugin holds (threads,
    buffers, hooks); ``Runtime.close`` calls the parts in reverse order, on every rank.
    """

    batch: Callable[[Batch], Batch] | None = None
    lockstep: bool = False
    no_sync: Callable[[], AbstractContextManager[None]] | None = None
    unreduced: Callable[[], Mapping[nn.Parameter, Callable[[], None]]] | None = None
    loss_scale: Callable[[], Tensor | float] | None = None
    after_backward: Callable[[], None] | None = None
    engine: Callable[..., Tensor] | None = None
    survey: Callable[[list[Batch]], None] | None = None
    split_tokens: Callable[[Tensor, float], Tensor] | None = None
    join_tokens: Callable[[Tensor, int], Tensor] | None = None
    forward_to_loss: Callable[[Callable[[], Tensor]], Tensor] | None = None
    loss: Callable[[Any, Batch], tuple[Any, Any]] | None = None
    needs_loss: str = ""
    rows: int = 0
    measure: Callable[[list[Batch], Any], Tensor] | None = None
    forward: Callable[[Batch], Mapping[str, Any]] | None = None
    optimizer: Callable[[Optimizer], Optimizer] | None = None
    before_clip: Callable[[], None] | None = None
    kept_gradients: Callable[[], Iterable[Tensor]] | None = None
    norm_axes: tuple[str, ...] = ()
    norm_skip: Collection[nn.Parameter] = ()
    zero_grad: Callable[[], None] | None = None
    metrics: Callable[[], Mapping[str, float]] | None = None
    state: PluginState | None = None
    close: Callable[[], None] | None = None


class Hooks:
    """The hook specifications, in the order of a run."""

    # ---- planning: integers only, before any process group; torch is not imported ----

    @hookspec
    def views(self, sizes: ParallelismSizes, world_size: int) -> list[View] | None:
        """Return additional views of the ranks, each with axes whose sizes multiply to *world_size*.

        Called on every rank, unless the sizes themselves do not make *world_size* ranks. Return None when the sizes of
        your axes do not divide, and report that in ``validate``.
        """

    @hookspec
    def validate(
        self, plan: MeshPlan, sizes: ParallelismSizes, plugins: tuple[Plugin, ...], device_type: str | None
    ) -> list[str] | None:
        """Return what is wrong, one sentence per problem; the problems of all plugins are raised as one error.

        Called on every rank, usually before a process group exists, so read nothing but the arguments and your own
        config. *plan* fits *sizes* or, when they do not multiply to the world size, is the nearest plan that does.
        *plugins* are all selected plugins, in stage order. *device_type* is that of the mesh; None is what each rank's
        process group can use.
        """

    @hookspec
    def explain(self, plan: MeshPlan, model: nn.Module | None) -> str | None:
        """Return one line on what you will do with *plan*, and to which modules of *model*.

        *model* is a transformers model on any device, or None when ``setup.explain()`` was given none.
        """

    @hookspec
    def traffic(self, plan: MeshPlan, facts: ModelFacts | None, model: nn.Module | None) -> list[Traffic] | None:
        """Return the collectives that a step will run, one entry for each kind; with bytes where *facts* are known.

        Called by ``setup.explain()`` and ``setup.explain_page()``; *facts* are those of *model*, and both are None when
        there is no model.
        """

    @hookspec
    def schedule(self, plan: MeshPlan, facts: ModelFacts | None, model: nn.Module | None) -> StepSchedule | None:
        """Return which rank of your axis works on which microbatch when, for a picture of a step.

        Called by ``setup.explain_page()``, with what ``traffic`` is given. Only one plugin may return one (the pipeline
        does); without one every rank has the whole model and one microbatch.
        """

    @hookspec
    def memory(self, ranks: list[RankShare], plan: MeshPlan, facts: ModelFacts, model: nn.Module) -> None:
        """Edit in *ranks* what a rank holds under *plan*, as your ``shard`` divides the model.

        *ranks* has one entry for all ranks alike, until a plugin replaces it by one for each rank along an axis that
        splits layers. Called by a search and by ``explain``, without a process group and often, in the order of
        ``shard``; *model* is whole, on the meta device, and must not change. Raise TopologyError, or ValueError, with
        what ``shard`` would refuse. Of a strategy without this hook neither knows what ranks hold.
        """

    @hookspec
    def agree(self, plan: MeshPlan) -> Mapping[str, str] | None:
        """Return, by name and as text, what must be the same on every rank besides configs: the content of files, say.

        Called on every rank before the mesh is created; where ranks differ, all raise a RankError that names ranks and
        fields.
        """

    # ---- loading: once, on every rank, after the mesh is live ----

    @hookspec
    def shard(self, parts: list[nn.Module], mesh: MeshContext, plan: MeshPlan) -> None:
        """Shard the modules in *parts*, whose parameters are on the meta device.

        Edit them in place, append further parts, or replace an entry by a module that wraps it: later plugins and the
        core find the model in it with ``nemo_dist.hf_model.inner_model``. A wrapper has no parameters of its own. The
        loader then reads, for every parameter that is a DTensor, only this rank's slice. To change a forward use
        ``nemo_dist.plugin.forwards.wrap_forward``, which keeps the changes of earlier plugins.
        """

    @hookspec
    def wrap(self, parts: list[nn.Module], mesh: MeshContext, plan: MeshPlan) -> None:
        """Edit *parts* as in ``shard``, after the weights are loaded and on their device.

        Whatever replaces the first part (torch's ``DistributedDataParallel``, say) is what the loader returns.
        """

    @hookspec
    def present(self, parts: list[nn.Module], mesh: MeshContext, plan: MeshPlan) -> object | None:
        """Return the object that the loader returns in place of the model; it must have ``.parts``.

        Only one plugin may return one (the pipeline does). None keeps the model itself.
        """

    # ---- training ----

    @hookspec
    def runtime(self, parts: list[nn.Module], mesh: MeshContext, plan: MeshPlan, model: object) -> RuntimePart | None:
        """Return what a training step needs from you; called once. *model* is what the loader returned."""

    # ---- checkpoints ----

    @hookspec
    def export_state(self, state: dict[str, Tensor], parts: list[nn.Module], mesh: MeshContext) -> None:
        """Rewrite *state* in place to the canonical state dict: Hugging Face names, global shapes, DTensors for shards.

        *state* maps names to parameters, or to tensors that are laid out like parameters.
        """

    @hookspec
    def import_state(self, state: dict[str, Tensor], parts: list[nn.Module], mesh: MeshContext) -> None:
        """Undo ``export_state`` after the canonical tensors were filled; plugins are called in reverse order."""
