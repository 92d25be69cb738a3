"""Score the rows of pairs with the model as it is loaded, which is the reference of a loss that compares them."""

from __future__ import annotations

from collections.abc import Iterable

import attrs
import torch

from nemo_dist.losses import row_scores
from nemo_dist.planning.mesh_plan import Role
from nemo_dist.recipe.row_stream import RowStream
from nemo_dist.training.runtime import Runtime


def score(streams: Iterable[RowStream | None], runtime: Runtime) -> None:
    """Give every row of *streams* its score by the model of *runtime*; call it on every rank."""
    for stream in streams:
        if stream is not None:
            scores = _scores(stream, runtime)
            stream.rows = [attrs.evolve(row, score=one) for row, one in zip(stream.rows, scores, strict=False)]


def _scores(stream: RowStream, runtime: Runtime) -> list[float]:
    """Return the scores of all rows, and of those that fill up the last batches; each rank computes rows of its own."""
    size, batches = stream.rows_of_batch * stream.ranks, stream.all()
    scores = torch.zeros(len(batches) * size, device=runtime.mesh.device)
    for number, batch in enumerate(batches):
        first = number * size + stream.rank * stream.rows_of_batch
        scores[first : first + stream.rows_of_batch] = row_scores(runtime.forward(batch), batch)
    group = runtime.mesh.group(Role.BATCH)
    if group is not None:
        torch.distributed.all_reduce(scores, group=group)  # the ranks that read different rows
    found: list[float] = scores.tolist()
    return found
