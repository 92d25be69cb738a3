"""The object that a training loop uses, the same for every topology; it calls no plugin hook during a step."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nemo_dist.checkpoint import async_save
from nemo_dist.checkpoint.hf_export import export
from nemo_dist.checkpoint.load import load
from nemo_dist.checkpoint.save import save
from nemo_dist.checkpoint.sharded_model import ShardedModel
from nemo_dist.errors import PluginError, RankError
from nemo_dist.hf_model import inner_model
from nemo_dist.mesh.mesh_context import MeshContext
from nemo_dist.mesh.rank_status import default_store, explained, step
from nemo_dist.mesh.whereabouts import Progress
from nemo_dist.planning.mesh_plan import Role
from nemo_dist.plugin.hookspecs import Batch, RuntimePart
from nemo_dist.plugin.protocol import Plugin
from nemo_dist.plugin.resharding import reshard
from nemo_dist.plugin.results import named_part, named_state
from nemo_dist.training.batch_loop import BatchLoop
from nemo_dist.training.evaluation import mean_loss, outputs_of
from nemo_dist.training.grad_norm import clip
from nemo_dist.training.merged_adapters import merged
from nemo_dist.training.parameters import named_shards
from nemo_dist.training.peft_adapters import adapters, refuse_prompts
from nemo_dist.training.replica_check import ReplicaCheck, check_replicas
from nemo_dist.training.router_aux_loss import RouterLoss
from nemo_dist.training.sharded_optimizer import OptimizerMaker
from nemo_dist.training.step_loss import LossFunction, ModelLoss, OwnLoss, chosen_loss, refuse_rows_that_meet
from nemo_dist.training.train_mode import refuse_in_training
from nemo_dist.training.uneven_batches import in_step
from nemo_dist.training.unreduced import Waiting
from nemo_dist.training.whole_rows import Outputs

RuntimeParts = Callable[[list[nn.Module], object], dict[str, RuntimePart]]


@attrs.frozen(kw_only=True, eq=False, slots=False)
class Runtime:
    """Train a sharded model as on a single process; make one with ``setup.runtime(model)``.

    Gradients: after ``forward_backward`` every gradient is that of the global token-weighted mean loss, the same as on
    one process that sees the whole batch. Strategies average gradients over the ranks that see different tokens
    (``Role.TOKENS``); the loss is scaled for that here, once. ``plugins`` maps each plugin's name to its runtime part.
    """

    sharded: ShardedModel
    model: Any
    plugins: Mapping[str, RuntimePart]
    loss: ModelLoss | OwnLoss
    router_loss: RouterLoss | None = None
    replicas: ReplicaCheck = attrs.field(factory=ReplicaCheck)

    @classmethod
    def assemble(
        cls,
        model: Any,
        sharded: ShardedModel,
        parts_of_plugins: RuntimeParts,
        selected: Sequence[Plugin],
        check_replicas: int | None = None,
        loss: LossFunction | None = None,
    ) -> Runtime:
        """Return the runtime of *model*, whose parts are *sharded*; *parts_of_plugins* calls the ``runtime`` hooks.

        ``loss`` is the user's, None for the model's own. Raises ValueError for a model whose own loss is not known to
        be a mean over labels, for a loss that a plugin cannot compute, and for adapters that the *selected* plugins
        are not tested with; PluginError when two plugins provide an engine.
        """
        parts = list(sharded.parts)
        reshard(parts)
        for part in parts:
            refuse_prompts(part)
        within = [inner_model(part) for part in parts]
        router_loss = RouterLoss.of(within, sharded.mesh)
        added = adapters(parts, sharded.mesh, selected)  # raises for unsupported ones before plugins see the model
        plugins = parts_of_plugins(parts, model) | added
        engines = [name for name, part in plugins.items() if part.engine is not None]
        if len(engines) > 1:
            raise PluginError(
                f"plugins {' and '.join(map(repr, engines))} both give an engine, which runs the batches in place of "
                "all others; leave one of them out"
            )
        refuse_rows_that_meet(within[-1], sharded.mesh)
        refuse_in_training(within, sharded.mesh, any(part.lockstep for part in plugins.values()))
        of_step = chosen_loss(loss, within[-1], plugins, sharded.mesh, routers_known=router_loss is not None)
        states = {name: named_state(name, part.state) for name, part in plugins.items() if part.state is not None}
        sharded = attrs.evolve(sharded, states=states)
        made = cls(
            sharded=sharded,
            model=model,
            plugins=plugins,
            loss=of_step,
            router_loss=router_loss,
            replicas=ReplicaCheck(every=0 if check_replicas is None and sharded.differing else check_replicas),
        )
        made._waiting.watch()
        return made

    @property
    def parts(self) -> Sequence[nn.Module]:
        """The parts of the model on this rank: the model itself, or its pipeline stages."""
        return self.sharded.parts

    @cached_property
    def _named_plugins(self) -> Mapping[str, RuntimePart]:
        """The parts of plugins, whose errors name the plugin."""
        return {name: named_part(name, part) for name, part in self.plugins.items()}

    @cached_property
    def _parts(self) -> tuple[RuntimePart, ...]:
        return tuple(self._named_plugins.values())

    @cached_property
    def _waiting(self) -> Waiting:
        return Waiting(self._parts, self.parts)

    @cached_property
    def _loop(self) -> BatchLoop:
        return BatchLoop(
            sharded=self.sharded,
            model=self.model,
            parts=self._parts,
            router_loss=self.router_loss,
            loss=self.loss,
        )

    @cached_property
    def _progress(self) -> Progress:
        store = default_store() if torch.distributed.is_initialized() else None
        return Progress.of_new_runtime(self.sharded.ranks.ranks, store)

    @property
    def mesh(self) -> MeshContext:
        """The live mesh."""
        return self.sharded.mesh

    @property
    def dp_size(self) -> int:
        """The number of different batches in a step: ``num_replicas`` of a ``DistributedSampler``."""
        return self.mesh.size(Role.BATCH)

    @property
    def dp_rank(self) -> int:
        """The data-parallel coordinate of this rank: ``rank`` of a ``DistributedSampler``."""
        return self.mesh.rank(Role.BATCH)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Iterate over the parameters of this rank, each once, with their names in the whole model."""
        return named_shards(self.parts)

    def optimizer(self, optimizer_type: type[Optimizer], params: Iterable[Any] | None = None, **options: Any) -> Any:
        """Return one optimizer over the parameters of all local parts.

        ``params``: parameters or parameter groups; by default all parameters that require gradients. ``options`` are
        passed to *optimizer_type*. A group may become two (experts are sharded by themselves) or be empty on a rank (of
        another pipeline stage), so ``group["group_index"]`` of each of its ``param_groups`` is the index of the one in
        ``params`` that it comes from.

        Raises ValueError on all ranks for an optimizer that does not step sharded parameters as one process steps whole
        ones, for adapters that were added after this runtime was made, for parameters that are not the model's, and
        where no rank has parameters; RankError when ranks pass another type, other options or other groups; all ranks
        must call this.
        """
        maker = OptimizerMaker(
            sharded=self.sharded, plugins=self._named_plugins, waiting=self._waiting, before_step=self._before_step
        )
        return maker.make(optimizer_type, params, options)

    def _before_step(self, *_: Any) -> None:
        reshard(self.parts)
        if self.replicas.due_in_own_loop:
            self._check_replicas_when_due()
        self.replicas.end_step()

    def batch(self, batch: Batch) -> dict[str, Any]:
        """Return what this rank computes on for the *batch* of its data-parallel coordinate, on its device."""
        return self._loop.batch(batch)

    def batches(self, loader: Iterable[Batch | Sequence[Batch]], *, pad: bool = False) -> Iterator[Any]:
        """Iterate over *loader*, this rank's, in step with the other ranks; all must take every batch.

        The loaders of ranks may have different numbers of batches. When the first of them ends, the loop ends on all
        ranks, with a warning that names that rank where others had more. With ``pad`` it goes on until the last one
        ends, and ranks that have none left get copies of their last batch in which no label counts: nothing is left
        out, and every loss and gradient is that of the real batches alone. An error of one loader is raised on all
        ranks. ``loader`` gives what ``forward_backward`` takes; it is never read ahead, so that its state can be saved.

        Costs one all-reduce of four integers per batch. Raises RankError when ranks that share a batch have different
        numbers of them; with ``pad``, ValueError for a rank that had no batch at all, for float labels, and for a loss
        that compares the rows of all ranks, as batches that are made up would be compared with.
        """
        if pad and isinstance(self.loss, OwnLoss) and self.loss.rows_together is None:
            raise ValueError("the loss compares all rows of all ranks, so no batch can be made up; leave out pad=True")
        return in_step(loader, self.sharded.ranks, self.dp_rank, pad)

    def forward_backward(self, batches: Batch | Sequence[Batch]) -> Tensor:
        """Run forward and backward and return the loss: a 0-dim float32 tensor, equal on every rank.

        ``batches``: this data-parallel rank's batch, a mapping of tensors with ``labels``; or a list of them, whose
        gradients are accumulated and reduced once. The loss is the sum of the token losses over all ranks and batches
        divided by the number of labels that are not -100, exactly what one process computes on all of it; of a loss of
        your own (``setup.runtime(model, loss=...)``), the sum of losses times weights over the sum of weights. If
        nothing counts on any rank, the loss is 0 and gradients are zero. Where the model adds a load balancing loss of
        its routers (``output_router_logits``), it is that of all tokens of the step. A list of batches then costs one
        more forward each, because the total load of the experts must be known before the first backward; so it does for
        a loss of your own that does not say by ``count(batch)`` what counts.

        Raises ValueError for a batch without labels or an empty list. Raises RankError on the first step when ranks
        that share a batch got different ones and, where forwards of different ranks run in lockstep (the strategy
        shards the model, for one), when ranks got different numbers of batches or only some of them images.
        """
        with step(self._progress):
            loss = self._loop.run(batches)
            if self.replicas.due and not self._waiting:
                self._check_replicas_when_due()
        return loss

    def evaluate(self, batches: Iterable[Batch | Sequence[Batch]]) -> Tensor:
        """Return the mean loss of *batches*, this data-parallel rank's: a 0-dim float32 tensor, equal on every rank.

        It is the sum of all losses over what counts (labels, or the weights of a loss of your own) in the batches of
        all ranks, without gradients and in evaluation mode, which is undone afterwards. Batches may differ in size, and
        ranks may have different numbers of them, but each at least one. The load balancing loss of routers, which is
        one of a training step, is left out.

        Raises ValueError where nothing counts, RankError on all ranks when the loader of one fails, or when batches
        make ranks run different modules, as for ``forward_backward``.
        """
        with explained():
            return mean_loss(self._loop, batches, self.sharded.ranks, self.dp_rank)

    def forward(self, batch: Batch) -> Outputs:
        """Return the model's outputs for *batch*: whole rows and whole logits on every rank that shares the batch.

        Without gradients, labels and dropout: for a frozen reference or teacher, or to look at logits. The outputs are
        attributes, and items, under the names that transformers gives them. Collective over the ranks of the batch, and
        where forwards of different ranks run in lockstep (the strategy shards the model, for one) over all ranks, each
        with its batch; RankError where those make them run different modules.
        """
        with explained():
            return outputs_of(self._loop, batch)

    def scale(self, count: Tensor | float) -> Tensor:
        """Return the factor of a summed loss in a loop of your own: a 0-dim float32 tensor, equal on every rank.

        ``count``: what counts in all batches of this rank in the step, of which the losses are summed. After
        ``(runtime.scale(count) * summed_loss).backward()`` gradients are those of the mean over what counts on all
        ranks, as strategies average gradients over ranks, whatever their counts are. Collective over the ranks that see
        different tokens.
        """
        return self._loop.scale_of(torch.as_tensor(count, dtype=torch.float32, device=self.mesh.device))

    def _check_replicas_when_due(self) -> None:
        """Check a step; of the first ones, on an accelerator only warn, as kernels that add in any order differ."""
        try:
            self.check_replicas()
        except RankError as error:
            if self.mesh.device.type == "cpu" or self.replicas.every is not None:
                raise
            warnings.warn(str(error), stacklevel=3)

    def check_replicas(self) -> None:
        """Raise RankError, on every rank, when a copy of a parameter or gradient differs between ranks that share it.

        Collective over all ranks; ``forward_backward`` calls it in the first steps and as often as the runtime was
        asked to.
        """
        check_replicas(self.named_parameters(), self.mesh)

    def no_sync(self) -> AbstractContextManager[None]:
        """Within the context, a backward does not reduce gradients, for accumulation in your own training loop.

        The next backward outside of it reduces them. Until then ``clip_grad_norm_`` and the step of an optimizer of
        ``runtime.optimizer`` raise RuntimeError, and its ``zero_grad`` drops them.
        """
        return self._loop.no_sync()

    def metrics(self) -> dict[str, float]:
        """Return the numbers that plugins measured since the last call, by name; all ranks must call it."""
        return {name: value for part in self._parts if part.metrics for name, value in part.metrics().items()}

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scale all gradients to a global norm of at most *max_norm*; return the norm before, equal on every rank.

        Every parameter of the whole model counts once, across all meshes, pipeline stages and experts. ``norm_type`` is
        the exponent, a number above 0 or ``inf``, the greatest absolute value; ValueError for another. A *max_norm* of
        ``inf`` leaves every gradient as it is. RuntimeError while gradients wait to be reduced, as ``no_sync`` says.
        """
        if not norm_type > 0:
            raise ValueError(f"norm_type must be above 0, or inf (got {norm_type!r})")
        with explained():
            self._waiting.refuse("clip_grad_norm_()")
            if self.replicas.due_in_own_loop:
                self._check_replicas_when_due()
            return clip(self._parts, self.named_parameters, max_norm, norm_type, self.mesh)

    def save(
        self,
        path: str | os.PathLike[str],
        optimizer: Optimizer | None = None,
        *,
        extra: Any = None,
        schedulers: Sequence[Any] = (),
        data: Any = None,
        asynchronous: bool = False,
        check_finite: bool = True,
    ) -> async_save.Save:
        """Save the run to the folder *path*; any strategy and topology can resume it; collective over all ranks.

        Saved are the weights, the optimizer by parameter name, the learning-rate ``schedulers``, the random generators
        of every rank, ``extra`` and, for every data-parallel rank, ``data.state_dict()``. ``extra`` and the state dicts
        hold plain values, tensors, and containers of them; nothing is pickled. The folder appears at *path* when it is
        complete and flushed to the disk; until then an older checkpoint stays there. Files in it that are not the
        checkpoint's stay too, and a folder that is no checkpoint is refused. A warning, and the manifest, name weights
        that are not finite, unless ``check_finite`` is False. With ``asynchronous`` the call returns
        when the state is copied to host memory; an error is then raised by ``wait()`` of the returned handle, by the
        next save or load, or at exit.

        Raises CheckpointError where the disk fails, RankError on the other ranks, TypeError for values that JSON and
        safetensors cannot hold.
        """
        return save(
            self.sharded,
            path,
            optimizer,
            extra=extra,
            schedulers=schedulers,
            data=data,
            asynchronous=asynchronous,
            check_finite=check_finite,
        )

    def load(
        self,
        path: str | os.PathLike[str],
        optimizer: Optimizer | None = None,
        *,
        schedulers: Sequence[Any] = (),
        data: Any = None,
    ) -> Any:
        """Load what ``save`` wrote under any topology, and return its ``extra``; collective over all ranks.

        Weights and moments are those saved, bit for bit; every rank reads only the chunks that it holds. Random
        generators are restored by rank where the topology is the same, and by data-parallel coordinate where it is not.
        All files are verified before anything is changed, and no code in them is run.

        Raises CheckpointError that says what is damaged, missing or does not fit, and RankError that quotes it on the
        other ranks.
        """
        return load(self.sharded, path, optimizer, schedulers=schedulers, data=data)

    def export(
        self, path: str | os.PathLike[str], dtype: torch.dtype | str | None = None, max_shard_size: int | str = "5GB"
    ) -> None:
        """Write a plain Hugging Face folder that transformers loads; collective over all ranks.

        ``dtype`` casts the floating-point weights. No file is larger than ``max_shard_size``, in bytes or like
        ``"5GB"``, except for a single tensor that is. Ranks write different files at the same time, and each holds
        whole only the parameters that are converted together, mostly one tensor. The folder appears at *path* when it
        is complete; old weights in it are removed, and other files stay. *path* may be the folder that the model was
        loaded from. Tokenizer and processor files are copied from there. Adapters of PEFT are merged into the weights
        that are written; ``save_pretrained`` of PEFT's model writes them by themselves.

        Raises CheckpointError where the disk fails, the model is quantized or its adapters are no sums of matrices
        (DoRA, IA3), RankError on the others.
        """
        with merged(self.sharded) as plain:
            export(plain, path, dtype, max_shard_size)

    def close(self) -> None:
        """Wait for the save under way, then call the ``close`` of every plugin in reverse order; ``with`` does so too.

        All plugins are called, also when one fails; then the first error is raised. Do not train with this runtime
        afterwards.
        """
        closing = [part.close for part in reversed(self._parts) if part.close is not None]
        errors: list[Exception] = []
        for close in (async_save.finish, *closing):
            try:
                close()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
