"""The object that a training loop uses, the same for every topology; it calls no plugin hook during a step."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import Optimizer

from nemo_dist.checkpoint import async_save
from nemo_dist.checkpoint.hf_export import export
from nemo_dist.checkpoint.load import load
from nemo_dist.checkpoint.save import save
from nemo_dist.checkpoint.sharded_model import ShardedModel
from nemo_dist.errors import PluginError
from nemo_dist.hf_model import has_towers, inner_model, name_root
from nemo_dist.mesh.mesh_context import MeshContext
from nemo_dist.planning.mesh_plan import Role
from nemo_dist.plugin.hookspecs import Batch, RuntimePart
from nemo_dist.plugin.protocol import Plugin
from nemo_dist.training.batch_checks import BatchCheck, require_one_form, tally
from nemo_dist.training.grad_norm import by_mesh, global_norm, one_mesh_per_group
from nemo_dist.training.loss_weighting import count_labels, judge_loss
from nemo_dist.training.peft_adapters import adapters, refuse_prompts
from nemo_dist.training.router_aux_loss import SWITCH, RouterLoss

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
    router_loss: RouterLoss | None = None
    _agreement: BatchCheck = attrs.field(factory=BatchCheck, init=False)

    @classmethod
    def assemble(
        cls, model: Any, sharded: ShardedModel, parts_of_plugins: RuntimeParts, strategy: Plugin | None
    ) -> Runtime:
        """Return the runtime of *model*, whose parts are *sharded*; *parts_of_plugins* calls the ``runtime`` hooks.

        Raises ValueError for a model whose loss is not known to be a mean over labels, and for adapters that *strategy*
        is not tested with; PluginError when two plugins provide an engine.
        """
        parts = list(sharded.parts)
        for part in parts:
            refuse_prompts(part)
        within = [inner_model(part) for part in parts]
        router_loss = RouterLoss.of(within, sharded.mesh)
        judge_loss(within[-1], routers_known=router_loss is not None)
        added = adapters(parts, sharded.mesh, strategy)  # raises for unsupported ones before plugins see the model
        plugins = parts_of_plugins(parts, model) | added
        engines = [name for name, part in plugins.items() if part.engine is not None]
        if len(engines) > 1:
            raise PluginError(
                f"plugins {' and '.join(map(repr, engines))} both give an engine, which runs the batches in place of "
                "all others; leave one of them out"
            )
        states = {name: part.state for name, part in plugins.items() if part.state is not None}
        sharded = attrs.evolve(sharded, states=states)
        return cls(sharded=sharded, model=model, plugins=plugins, router_loss=router_loss)

    @property
    def parts(self) -> Sequence[nn.Module]:
        """The parts of the model on this rank: the model itself, or its pipeline stages."""
        return self.sharded.parts

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
        """Yield the parameters of this rank, each once, with their names in the whole model."""
        seen: set[int] = set()
        for part in self.parts:
            for name, parameter in name_root(part).named_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield name, parameter

    def optimizer(self, optimizer_type: type[Optimizer], params: Iterable[Any] | None = None, **options: Any) -> Any:
        """Return one optimizer over the parameters of all local parts.

        ``params``: parameters or parameter groups; by default all parameters that require gradients. ``options`` are
        passed to *optimizer_type*.
        """
        if params is None:
            params = [parameter for _, parameter in self.named_parameters() if parameter.requires_grad]
        optimizer = optimizer_type(one_mesh_per_group(params), **options)
        for part in self._parts:
            optimizer = part.optimizer(optimizer) if part.optimizer else optimizer
        droppers = [part.zero_grad for part in self._parts if part.zero_grad is not None]
        return _dropping_gradients_of(optimizer, droppers) if droppers else optimizer

    def batch(self, batch: Batch) -> dict[str, Any]:
        """Return what this rank computes on for the *batch* of its data-parallel coordinate, on its device."""
        for part in self._parts:
            batch = part.batch(batch) if part.batch else batch
        device = self.mesh.device
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}

    def forward_backward(self, batches: Batch | Sequence[Batch]) -> Tensor:
        """Run forward and backward and return the loss: a 0-dim float32 tensor, equal on every rank.

        ``batches``: this data-parallel rank's batch, a mapping of tensors with ``labels``; or a list of them, whose
        gradients are accumulated and reduced once. The loss is the sum of the token losses over all ranks and batches
        divided by the number of labels that are not -100, exactly what one process computes on all of it. If no label
        counts on any rank, the loss is 0 and gradients are zero. Where the model adds a load balancing loss of its
        routers (``output_router_logits``), it is that of all tokens of the step. A list of batches then costs one more
        forward each, because the total load of the experts must be known before the first backward.

        Raises ValueError for a batch without labels or an empty list. Raises RankError on the first step when ranks
        that share a batch got different ones and, where forwards of different ranks run in lockstep (the strategy
        shards the model, for one), when ranks got different numbers of batches or only some of them images.
        """
        given = [batches] if isinstance(batches, Mapping) else list(batches)
        if not given:
            raise ValueError("forward_backward got an empty list; pass at least one batch")
        self._agreement.once(given, self.mesh)
        local: list[Batch] = [self.batch(batch) for batch in given]
        counts = torch.stack([count_labels(self._last, batch) for batch in local])
        total = self._total(counts.sum(), given)
        weights = counts / total.clamp(min=1)
        # The strategy averages gradients over these ranks, but the gradient of the mean loss is a sum over them.
        scale = (1 if self._token_group is None else self._token_group.size()) * self._loss_scale()
        routers = self.router_loss
        if routers is None or not routers.wanted(local):
            loss, balance = self._engine(local, list(weights * scale)), torch.zeros((), device=self.mesh.device)
        else:
            with routers.step():
                batches = [routers.without(batch) for batch in local]
                loss, balance = self._balanced(routers, batches, weights, scale)
        for part in self._parts:
            if part.after_backward is not None:
                part.after_backward()
        return self._sum_over_batches(loss / scale) + balance

    def _loss_scale(self) -> Any:
        """Return the product of the loss scales of all plugins, 1 where there is none."""
        scale: Any = 1
        for part in self._parts:
            scale = scale * part.loss_scale() if part.loss_scale is not None else scale
        return scale

    def _balanced(
        self, routers: RouterLoss, batches: list[Batch], weights: Tensor, scale: Any
    ) -> tuple[Tensor, Tensor]:
        """Run forward and backward with the router loss; return the weighted model losses and the router loss."""
        settled: list[Tensor] = []

        def settle() -> None:
            if not settled:
                settled.append(routers.settle(scale))

        engine = self._engine_part
        if engine is not None or len(batches) > 1:
            self._survey(engine, routers, batches)
            settle()
        return self._engine(batches, list(weights * scale), before_backward=settle), settled[0]

    def _survey(self, engine: RuntimePart | None, routers: RouterLoss, batches: list[Batch]) -> None:
        """Run every forward once without gradients, so that the routers count the tokens of all batches."""
        if engine is not None and engine.survey is None:
            raise ValueError(
                f"the plugin that runs the batches cannot run them without a backward, which a router loss needs; "
                f"turn the loss off with {SWITCH}=False"
            )
        with routers.survey():
            if engine is not None and engine.survey is not None:
                engine.survey(batches)
            else:
                for batch in batches:
                    self.model(**batch)

    def _engine(
        self, batches: list[Batch], weights: list[Tensor], before_backward: Callable[[], None] | None = None
    ) -> Tensor:
        if self._engine_part is not None and self._engine_part.engine is not None:
            return self._engine_part.engine(batches, weights)
        return self._accumulate(batches, weights, before_backward)

    def _accumulate(
        self, batches: list[Batch], weights: list[Tensor], before_backward: Callable[[], None] | None
    ) -> Tensor:
        total = torch.zeros((), device=self.mesh.device)
        for index, (batch, weight) in enumerate(zip(batches, weights, strict=True)):
            last = index == len(batches) - 1
            with nullcontext() if last else self.no_sync():
                loss = self.model(**batch).loss * weight
                if before_backward is not None:
                    before_backward()
                loss.backward()
            # Without an unmasked label the model's mean is 0/0, but its weight is 0: it adds nothing to the loss.
            total += torch.where(weight > 0, loss.detach().float(), total.new_zeros(()))
        return total

    @cached_property  # looking a group up on a mesh costs half a millisecond, too much for every step
    def _token_group(self) -> dist.ProcessGroup | None:
        """The process group of the ranks that see different tokens; None when one rank sees all."""
        return self.mesh.group(Role.TOKENS)

    @cached_property
    def _parts(self) -> tuple[RuntimePart, ...]:
        return tuple(self.plugins.values())

    @cached_property
    def _engine_part(self) -> RuntimePart | None:
        return next((part for part in self._parts if part.engine is not None), None)

    @cached_property
    def _last(self) -> nn.Module:
        return inner_model(self.parts[-1])

    def _total(self, count: Tensor, given: Sequence[Batch]) -> Tensor:
        """Sum the label *count* over the ranks that see different tokens; raise RankError if batches would hang."""
        if self._token_group is None:
            return count
        sums = tally(count, given)
        dist.all_reduce(sums, group=self._token_group)
        # Reading the sums from a GPU waits for it, so they are read only where ranks are likely to differ.
        if self._lockstep and (sums.device.type == "cpu" or len(given) > 1 or self._has_towers):
            require_one_form(sums, given)
        return sums[0].float()

    @cached_property
    def _lockstep(self) -> bool:
        return any(part.lockstep for part in self._parts)

    @cached_property
    def _has_towers(self) -> bool:
        return any(has_towers(inner_model(part)) for part in self.parts)

    def _sum_over_batches(self, value: Tensor) -> Tensor:
        """Sum *value* over the ranks that see different tokens."""
        value = value.detach().clone().float()
        if self._token_group is not None:
            dist.all_reduce(value, group=self._token_group)
        return value

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within the context, a backward does not reduce gradients, for accumulation in your own training loop."""
        with ExitStack() as stack:
            for part in self._parts:
                if part.no_sync is not None:
                    stack.enter_context(part.no_sync())
            yield

    def metrics(self) -> dict[str, float]:
        """Return the numbers that plugins measured since the last call, by name; all ranks must call it."""
        return {name: value for part in self._parts if part.metrics for name, value in part.metrics().items()}

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scale all gradients to a global norm of at most *max_norm*; return the norm before, equal on every rank.

        Every parameter of the whole model counts once, across all meshes, pipeline stages and experts.
        """
        for part in self._parts:
            if part.before_clip is not None:
                part.before_clip()
        skipped = {id(parameter) for part in self._parts for parameter in part.norm_skip}
        parameters = [parameter for _, parameter in self.named_parameters() if parameter.grad is not None]
        counted = [parameter.grad for parameter in parameters if id(parameter) not in skipped]
        kept = [grad for part in self._parts if part.kept_gradients is not None for grad in part.kept_gradients()]
        axes = tuple(axis for part in self._parts for axis in part.norm_axes)
        norm = global_norm([*(grad for grad in counted if grad is not None), *kept], norm_type, axes, self.mesh)
        for group in by_mesh(parameters).values():
            clip_grads_with_norm_(group, max_norm, norm)
        if kept:
            factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch clips the others
            for grad in kept:
                grad.mul_(factor)
        return norm

    def save(
        self,
        path: str | os.PathLike[str],
        optimizer: Optimizer | None = None,
        *,
        extra: Any = None,
        schedulers: Sequence[Any] = (),
        data: Any = None,
        asynchronous: bool = False,
    ) -> async_save.Save:
        """Save the run to the folder *path*; any strategy and topology can resume it; collective over all ranks.

        Saved are the weights, the optimizer by parameter name, the learning-rate ``schedulers``, the random generators
        of every rank, ``extra`` and, for every data-parallel rank, ``data.state_dict()``. ``extra`` and the state dicts
        hold plain values, tensors, and containers of them; nothing is pickled. The folder appears at *path* when it is
        complete and flushed to the disk; until then an older folder stays there. With ``asynchronous`` the call returns
        when the state is copied to host memory; an error is then raised by ``wait()`` of the returned handle, by the
        next save or load, or at exit.

        Raises CheckpointError where the disk fails, RankError on the other ranks, TypeError for values that JSON and
        safetensors cannot hold.
        """
        return save(
            self.sharded, path, optimizer, extra=extra, schedulers=schedulers, data=data, asynchronous=asynchronous
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
        loaded from. Tokenizer and processor files are copied from there.

        Raises CheckpointError where the disk fails or the model is quantized or has adapters, RankError on the others.
        """
        export(self.sharded, path, dtype, max_shard_size)

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


def _dropping_gradients_of(optimizer: Any, droppers: Sequence[Callable[[], None]]) -> Any:
    """Make ``zero_grad`` of *optimizer* also call *droppers*, which drop the gradients that plugins keep."""
    found = optimizer.zero_grad

    def zero_grad(*args: Any, **kwargs: Any) -> None:
        found(*args, **kwargs)
        for drop in droppers:
            drop()

    optimizer.zero_grad = zero_grad
    return optimizer
