"""Run forward and backward of a step over its batches, weighted so that the gradients are those of one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_dist.checkpoint.sharded_model import ShardedModel
from nemo_dist.hf_model import has_towers, inner_model
from nemo_dist.mesh.mesh_context import MeshContext
from nemo_dist.planning.mesh_plan import Role
from nemo_dist.plugin.hookspecs import Batch, RuntimePart
from nemo_dist.plugin.resharding import keep_gathered
from nemo_dist.training.batch_checks import BatchCheck, require_one_form, tally
from nemo_dist.training.loss_weighting import count_labels
from nemo_dist.training.model_inputs import ModelInputs
from nemo_dist.training.router_aux_loss import COUNTED, SWITCH, RouterLoss


@attrs.frozen(kw_only=True, eq=False, slots=False)
class BatchLoop:
    """Forward and backward of *model*, whose parts are ``sharded``, with what the plugins do in a step, ``parts``."""

    sharded: ShardedModel
    model: Any
    parts: Sequence[RuntimePart]
    router_loss: RouterLoss | None
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
        local: list[Batch] = [self.batch(batch) for batch in given]
        counts = torch.stack([count_labels(self._last, batch) for batch in local])
        total = self._total(counts.sum(), given)
        weights = counts / total.clamp(min=1)
        # The strategy averages gradients over these ranks, but the gradient of the mean loss is a sum over them.
        scale = (1 if self._token_group is None else self._token_group.size()) * self._loss_scale()
        routers = self.router_loss
        with keep_gathered(self.sharded.parts):
            if routers is None or not routers.wanted(local):
                loss, balance = self._engine(local, list(weights * scale)), torch.zeros((), device=self.mesh.device)
            else:
                with routers.step():
                    batches = [routers.without(batch) for batch in local]
                    loss, balance = self._balanced(routers, batches, weights, scale)
        for part in self.parts:
            if part.after_backward is not None:
                part.after_backward()
        return self._sum_over_batches(loss / scale) + balance

    def batch(self, batch: Batch) -> dict[str, Any]:
        """Return what this rank computes on for the *batch* of its data-parallel coordinate, on its device."""
        batch = self._inputs(batch)
        for part in self.parts:
            batch = part.batch(batch) if part.batch else batch
        device = self.mesh.device
        counting = self.router_loss is not None and not self.router_loss.unknown
        return {
            name: value.to(device, non_blocking=device.type != "cpu") if isinstance(value, Tensor) else value
            for name, value in batch.items()
            if counting or name != COUNTED  # no hook would take it out before the model's forward
        }

    @cached_property
    def _inputs(self) -> ModelInputs:
        return ModelInputs(self.sharded.parts[-1])

    def _loss_scale(self) -> Any:
        """Return the product of the loss scales of all plugins, 1 where there is none."""
        scale: Any = 1
        for part in self.parts:
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
    def _engine_part(self) -> RuntimePart | None:
        return next((part for part in self.parts if part.engine is not None), None)

    @cached_property
    def _last(self) -> nn.Module:
        return inner_model(self.sharded.parts[-1])

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
        return any(part.lockstep for part in self.parts)

    @cached_property
    def _has_towers(self) -> bool:
        return any(has_towers(inner_model(part)) for part in self.sharded.parts)

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
            for part in self.parts:
                if part.no_sync is not None:
                    stack.enter_context(part.no_sync())
            yield
