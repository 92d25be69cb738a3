"""Run forward and backward of a step over its batches, weighted so that the gradients are those of one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property, partial
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_dist.checkpoint.sharded_model import ShardedModel
from nemo_dist.hf_model import has_towers, inner_model
from nemo_dist.mesh.mesh_context import MeshContext
from nemo_dist.planning.mesh_plan import Role
from nemo_dist.plugin.hookspecs import Batch, RuntimePart
from nemo_dist.plugin.resharding import keep_gathered
from nemo_dist.training.batch_checks import BatchCheck, require_one_form, tally
from nemo_dist.training.batch_entries import BatchEntries
from nemo_dist.training.kept_state import on_copies
from nemo_dist.training.loss_parameters import refuse_trained, tensors_at_hand
from nemo_dist.training.model_inputs import ModelInputs
from nemo_dist.training.router_aux_loss import COUNTED, SWITCH, RouterLoss
from nemo_dist.training.step_loss import ROWS, ModelLoss, OwnLoss, at_least_something


@attrs.frozen(kw_only=True, eq=False, slots=False)
class BatchLoop:
    """Forward and backward of *model*, whose parts are ``sharded``, with what the plugins do in a step, ``parts``."""

    sharded: ShardedModel
    model: Any
    parts: Sequence[RuntimePart]
    router_loss: RouterLoss | None
    loss: ModelLoss | OwnLoss
    _agreement: BatchCheck = attrs.field(factory=BatchCheck, init=False)

    @property
    def mesh(self) -> MeshContext:
        """The live mesh."""
        return self.sharded.mesh

    def run(self, batches: Batch | Sequence[Batch]) -> Tensor:
        """Run the step and return its loss; see :meth:`nemo_dist.Runtime.forward_backward`."""
        given = [batches] if isinstance(batches, Mapping) else list(batches)
        if not given:
            raise ValueError("forward_backward got an empty list; pass at least one batch")
        self._agreement.once(given, self.mesh)
        local: list[Batch] = [self.prepared(batch) for batch in given]
        step = _Step(loop=self, batches=local, known=self._known(local))
        step.total = self._total(step.known, given)
        with keep_gathered(self.sharded.parts):
            routers = self.router_loss
            if routers is None or not routers.wanted(local):
                found, balance = step.run(None), torch.zeros((), device=self.mesh.device)
            else:
                with routers.step():
                    step.batches = [routers.without(batch) for batch in local]
                    found = step.run(routers)
                    balance = step.balance
        for part in self.parts:
            if part.after_backward is not None:
                part.after_backward()
        if isinstance(self.loss, OwnLoss) and self.mesh.size(Role.TOKENS) > 1:
            refuse_trained(self.loss.function, self._beside_the_model)
        return self.sum_over_batches(found / step.scale) + balance

    def _known(self, batches: Sequence[Batch]) -> Tensor | None:
        """Return what counts in each of *batches*, None where only the outputs of the model tell."""
        counts = [self.loss.count(batch) for batch in batches]
        found = [count.to(self.mesh.device) for count in counts if count is not None]
        return torch.stack(found) if len(found) == len(counts) else None

    def prepared(self, batch: Batch) -> dict[str, Any]:
        """Return *batch* as the model gets it on this rank, with what only the loss reads."""
        if isinstance(self.loss, ModelLoss):
            return self.batch(batch)
        batch = self._here(batch)  # once, for model and loss
        counted = {COUNTED: batch[COUNTED]} if COUNTED in batch else {}
        return self.batch(self.loss.model_inputs(batch) | counted) | self.loss.reads(batch)

    def batch(self, batch: Batch) -> dict[str, Any]:
        """Return what this rank computes on for the *batch* of its data-parallel coordinate, on its device."""
        self._entries(batch)
        batch = self._inputs({name: value for name, value in batch.items() if name != ROWS})
        for part in self.parts:
            batch = part.batch(batch) if part.batch else batch
        counting = self.router_loss is not None and not self.router_loss.unknown
        # Where no router counts, no hook would take it out before the model's forward.
        return {name: value for name, value in self._here(batch).items() if counting or name != COUNTED}

    def _here(self, batch: Batch) -> dict[str, Any]:
        """Return *batch* with its tensors on this rank's device."""
        device = self.mesh.device
        return {
            name: value.to(device, non_blocking=device.type != "cpu") if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }

    @cached_property
    def _inputs(self) -> ModelInputs:
        return ModelInputs(self.sharded.parts[-1])

    @cached_property
    def _beside_the_model(self) -> list[tuple[str, Tensor]]:
        return list(tensors_at_hand(self.loss.function)) if isinstance(self.loss, OwnLoss) else []

    @cached_property
    def _entries(self) -> BatchEntries:
        return BatchEntries(
            model=inner_model(self.sharded.parts[-1]),
            apart=any(self.mesh.size(role) > 1 for role in (Role.TOKENS, Role.LAYERS)),
            weighs=isinstance(self.loss, ModelLoss),
        )

    def loss_scale(self) -> Any:
        """Return the product of the loss scales of all plugins, 1 where there is none."""
        scale: Any = 1
        for part in self.parts:
            scale = scale * part.loss_scale() if part.loss_scale is not None else scale
        return scale

    def scale_of(self, count: Tensor) -> Tensor:
        """Return the factor of a summed loss of which *count* counts on this rank; see ``Runtime.scale``."""
        return self.token_ranks / at_least_something(self.sum_over_batches(count))

    def forward_to_loss(self, run: Callable[[], Tensor]) -> Tensor:
        """Return the loss that *run* makes of a forward, as a strategy wants it for the backward."""
        if isinstance(self.loss, ModelLoss):  # it is among the outputs, which strategies see
            return run()
        for part in self.parts:
            if part.forward_to_loss is not None:
                run = partial(part.forward_to_loss, run)
        return run()

    def measure(self, batches: Sequence[Batch]) -> Tensor:
        """Return the total sum and count of the loss of prepared *batches*, float64 (2,), without gradients."""
        engine = self.engine
        if engine is not None:
            if engine.measure is None:
                raise ValueError(
                    "the plugin that runs the batches cannot run them without a backward, which this loss needs; give "
                    "the loss a function count(batch), which tells what counts from the batch alone"
                )
            return engine.measure(list(batches), self.loss)
        total = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)
        with torch.no_grad():
            for batch in batches:
                total += torch.stack(self.loss(self.model(**self.loss.inputs(batch)), batch)).double()
        return total

    @property
    def token_ranks(self) -> int:
        """The number of ranks that see different tokens, over which strategies average gradients."""
        return 1 if self._token_group is None else self._token_group.size()

    @cached_property  # looking a group up on a mesh costs half a millisecond, too much for every step
    def _token_group(self) -> dist.ProcessGroup | None:
        """The process group of the ranks that see different tokens; None when one rank sees all."""
        return self.mesh.group(Role.TOKENS)

    @cached_property
    def engine(self) -> RuntimePart | None:
        """What the plugin that runs the batches in place of this loop gives, if one does."""
        return next((part for part in self.parts if part.engine is not None), None)

    def require_same_modules(self, given: Sequence[Batch]) -> None:
        """Raise RankError where ranks that run their modules together have batches for which they run others."""
        if self._lockstep and self._token_group is not None:
            sums = tally(torch.zeros((), device=self.mesh.device), given)
            dist.all_reduce(sums, group=self._token_group)
            self._judge_form(sums, given)

    def _judge_form(self, sums: Tensor, given: Sequence[Batch]) -> None:
        # Reading the sums from a GPU waits for it, so they are read only where ranks are likely to differ.
        if self._lockstep and (sums.device.type == "cpu" or len(given) > 1 or self._has_towers):
            require_one_form(sums, given)

    def _total(self, counts: Tensor | None, given: Sequence[Batch]) -> Tensor | None:
        """Sum *counts* over the ranks that see different tokens, if known; raise RankError if batches would hang."""
        if self._token_group is None:
            return None if counts is None else counts.sum()
        whole = counts is not None and isinstance(self.loss, ModelLoss)
        nothing = torch.zeros((), device=self.mesh.device)
        sums = tally(nothing if counts is None or not whole else counts.sum(), given)
        dist.all_reduce(sums, group=self._token_group)
        self._judge_form(sums, given)
        if whole or counts is None:
            return sums[0].float() if whole else None
        return self.sum_over_batches(counts.sum())  # of weights that are no whole numbers

    @cached_property
    def _lockstep(self) -> bool:
        return any(part.lockstep for part in self.parts)

    @cached_property
    def _has_towers(self) -> bool:
        return any(has_towers(inner_model(part)) for part in self.sharded.parts)

    def sum_over_batches(self, value: Tensor) -> Tensor:
        """Sum *value* over the ranks that see different tokens."""
        value = value.detach().clone().float()
        if self._token_group is not None:
            dist.all_reduce(value, group=self._token_group)
        return value

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within the context, a backward does not reduce gradients, for accumulation in your own training loop."""
        with ExitStack() as stack:
            for part in self.parts:
                if part.no_sync is not None:
                    stack.enter_context(part.no_sync())
            yield


@attrs.define(kw_only=True, eq=False)
class _Step:
    """One step of *loop* over prepared ``batches``.

    ``known``: what counts in each batch, None where only the outputs tell. ``total``: what counts in the batches of all
    ranks, None as long as it is not known. ``balance``: the router loss. The gradient of the mean loss is a sum over
    the ranks, and strategies average: ``scale`` makes up for that.
    """

    loop: BatchLoop
    batches: list[Batch]
    known: Tensor | None
    total: Tensor | None = None
    balance: Tensor = attrs.field(factory=lambda: torch.zeros(()))
    scale: Any = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.scale = self.loop.token_ranks * self.loop.loss_scale()

    def run(self, routers: RouterLoss | None) -> Tensor:
        """Run all forwards and backwards; return the sum of the losses times ``scale``, over the total count."""
        several = self.loop.engine is not None or len(self.batches) > 1
        if several and (routers is not None or self.total is None):
            self._survey(routers)
        engine = self.loop.engine
        if engine is not None and engine.engine is not None:
            return self._run_engine(engine.engine)
        return self._accumulate(routers)

    def _survey(self, routers: RouterLoss | None) -> None:
        """Run every forward once without gradients: the backwards need the counts and router loads of all batches."""
        engine, counts = self.loop.engine, self.total is None
        if routers is not None and engine is not None and engine.survey is None and engine.measure is None:
            raise ValueError(
                f"the plugin that runs the batches cannot run them without a backward, which a router loss needs; "
                f"turn the loss off with {SWITCH}=False"
            )
        with unchanged_draws(self.loop.mesh.device), on_copies(self.loop.sharded.parts):
            if counts:
                self._counted(self.loop.measure(self.batches)[1].float())
            elif engine is not None and engine.survey is not None:
                engine.survey([self.loop.loss.inputs(batch) for batch in self.batches])
            else:
                for batch in self.batches:
                    self.loop.model(**self.loop.loss.inputs(batch))
        if routers is not None:
            self.balance = routers.settle(self.scale)

    def _counted(self, count: Tensor) -> None:
        """Take *count* as what counts in the batches of this rank."""
        self.total = self.loop.sum_over_batches(count)

    def _weight(self) -> Tensor:
        """Return the factor of a sum of losses, 0-dim float32."""
        if self.total is None:
            raise RuntimeError("what counts in the step is not known yet")
        found: Tensor = self.scale / at_least_something(self.total)
        return found

    def _run_engine(self, engine: Callable[..., Tensor]) -> Tensor:
        if isinstance(self.loop.loss, OwnLoss):
            return engine(self.batches, [self._weight()] * len(self.batches), self.loop.loss)
        counts = torch.ones(len(self.batches)) if self.known is None else self.known
        return engine(self.batches, list(counts * self._weight()))

    def _accumulate(self, routers: RouterLoss | None) -> Tensor:
        total = torch.zeros((), device=self.loop.mesh.device)
        for index, batch in enumerate(self.batches):
            last = index == len(self.batches) - 1
            with nullcontext() if last else self.loop.no_sync():
                loss = self.loop.forward_to_loss(partial(self._loss, index, batch, routers))
                loss.backward()
            total += loss.detach()
        return total

    def _loss(self, index: int, batch: Batch, routers: RouterLoss | None) -> Tensor:
        """Return the loss of *batch* with its weight in the step."""
        loss = self.loop.loss
        found, count = loss(self.loop.model(**loss.inputs(batch)), batch)
        if routers is not None and len(self.batches) == 1:
            self.balance = routers.settle(self.scale)
        if self.total is None:
            self._counted(count)
        elif isinstance(loss, OwnLoss) and self.known is not None:
            require_same_count(self.known[index], count)
        return found * self._weight()


@contextmanager
def unchanged_draws(device: torch.device) -> Iterator[None]:
    """Within the context run forwards without gradients; at its end the random generators are those of before.

    So the forwards that follow draw the same dropout masks and choose the same experts.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        yield


def require_same_count(known: Tensor, found: Tensor) -> None:
    """Raise ValueError where a loss counts something else than its ``count`` said; on the CPU only, as it is read."""
    if found.device.type == "cpu" and abs(known.item() - found.item()) > 1e-4 * abs(found.item()):
        raise ValueError(
            f"the loss counts {found.item():g} in a batch, but its count(batch) says {known.item():g}; make count "
            "return the sum of the weights"
        )
