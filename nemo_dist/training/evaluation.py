"""Run forwards of batches without gradients: the loss of all of them, or the outputs of one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_dist.hf_model import inner_model
from nemo_dist.mesh.rank_group import RankGroup
from nemo_dist.planning.mesh_plan import Role
from nemo_dist.plugin.hookspecs import Batch
from nemo_dist.plugin.resharding import keep_gathered
from nemo_dist.training.batch_checks import BatchCheck
from nemo_dist.training.batch_loop import BatchLoop
from nemo_dist.training.router_aux_loss import SWITCH
from nemo_dist.training.uneven_batches import in_step
from nemo_dist.training.whole_rows import Outputs, WholeRows


@attrs.frozen
class _Again:
    """A batch that a rank without further ones runs once more, so that the others can run theirs; it counts nothing."""

    batches: Any


def mean_loss(loop: BatchLoop, loader: Iterable[Batch | Sequence[Batch]], ranks: RankGroup, place: int) -> Tensor:
    """Return the loss of all batches of the loaders of all ranks; see :meth:`nemo_dist.Runtime.evaluate`."""
    total = torch.zeros(2, dtype=torch.float64, device=loop.mesh.device)
    agreement = BatchCheck()
    # A loss that compares the rows of all ranks would meet those of a batch that is run once more.
    pad = getattr(loop.loss, "rows_together", 1) is not None
    with evaluating(loop.sharded.parts), keep_gathered(loop.sharded.parts):
        for taken in in_step(loader, ranks, place, pad=pad, padding=_Again):
            given = taken.batches if isinstance(taken, _Again) else taken
            batches = [given] if isinstance(given, Mapping) else list(given)
            agreement.once(batches, loop.mesh)
            loop.require_same_modules(batches)
            found = loop.measure([_without_router_loss(loop, loop.prepared(batch)) for batch in batches])
            if not isinstance(taken, _Again):
                total += found
    group = loop.mesh.group(Role.TOKENS)
    if group is not None:
        dist.all_reduce(total, group=group)  # the ranks that see different tokens
    if total[1] == 0:
        raise ValueError(
            "nothing counts in the batches of all ranks (no label, or no batch), so they have no mean loss"
        )
    return (total[0] / total[1]).float()


def outputs_of(loop: BatchLoop, batch: Batch) -> Outputs:
    """Return the outputs for whole rows of *batch*; see :meth:`nemo_dist.Runtime.forward`."""
    loop.require_same_modules([batch])
    calls = WholeRows(model=inner_model(loop.sharded.parts[-1]), parts=loop.parts)
    inputs = _without_router_loss(loop, loop.batch(calls.inputs(batch)))
    engine = loop.engine
    with evaluating(loop.sharded.parts), torch.no_grad():
        if engine is None:
            found = loop.model(**inputs)
        elif engine.forward is not None:
            found = engine.forward(inputs)
        else:
            raise ValueError("the plugin that runs the batches cannot run a forward alone; call the parts of the model")
        found = calls.joined(found, inputs, batch)
    return Outputs(dict(found.items()))


def _without_router_loss(loop: BatchLoop, batch: Batch) -> Batch:
    """Return *batch* with the load balancing loss off, which is one of a step and no mean over labels."""
    routers = loop.router_loss
    if routers is None:
        return batch
    return {**batch, SWITCH: False} if not routers.unknown or routers.wanted([batch]) else batch


@contextmanager
def evaluating(parts: Iterable[nn.Module]) -> Iterator[None]:
    """Within the context *parts* are in evaluation mode; at its end every module is in the mode that it was in."""
    listed = list(parts)
    modes = [(module, module.training) for part in listed for module in part.modules()]
    for part in listed:
        part.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
