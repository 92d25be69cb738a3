"""What the planning of a save and of a load costs one rank of a large world, by doing it in this process alone."""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import attrs
from torch import Tensor

from nemo_dist.checkpoint import manifest
from nemo_dist.checkpoint.chunks import Planner, pieces_of
from nemo_dist.checkpoint.holdings import Held
from nemo_dist.checkpoint.layout import Cut, Layout
from nemo_dist.checkpoint.manifest import Manifest
from nemo_dist.checkpoint.save_plan import SavePlan
from nemo_dist.mesh.rank_group import RankGroup, alike, digest_of
from nemo_dist.planning.mesh_plan import MeshPlan, Role

_REPEATS = 5  # saves of the same tensors, of which the median counts


@attrs.frozen
class Placed:
    """A tensor and how it is placed: the axes that shard it, outermost first, with the dim that each shards.

    An axis is one of a mesh plan. Beside the dim may stand the factor of a strided shard.
    """

    shape: tuple[int, ...]
    dtype: str
    placements: Mapping[str, tuple[int, ...]]


@attrs.frozen(kw_only=True)
class PlanningCost:
    """What one rank spends: seconds of CPU, bytes, and the peak of the memory of this process until then.

    A repeated save is of the same tensors as the one before. ``exchanged_bytes`` are those that the rank sends and
    receives to agree on the plan.
    """

    save_planning_cpu_s: float
    repeated_planning_cpu_s: float
    exchanged_bytes: int
    manifest_bytes: int
    manifest_cpu_s: float
    load_planning_cpu_s: float
    peak_rss_bytes: int


def held_of(plan: MeshPlan, tensors: Mapping[str, Placed]) -> dict[str, Held]:
    """Return what every rank of a stage holds of *tensors*, which are placed on axes of *plan*."""
    found = {}
    for name, tensor in tensors.items():
        spans = {axis: plan.view_of(axis).span(axis) for axis in tensor.placements}
        cuts = [Cut(dim, *spans[axis], *factor) for axis, (dim, *factor) in tensor.placements.items()]
        found[name] = Held(tensor.shape, tensor.dtype, Layout(tuple(cut for cut in cuts if cut.parts > 1)))
    return found


def planning_cost(
    plan: MeshPlan,
    stages: Sequence[Mapping[str, Placed]],
    rank: int,
    state: Mapping[str, Tensor] | None = None,
) -> PlanningCost:
    """Plan a first save, a repeated one and a load on *rank* of *plan*, by the functions of a real save and load.

    *stages* are the canonical tensors of each stage of a pipeline, one without a pipeline. *state* is that of this rank
    on torch's fake process group, where it exists: then it is described, in place of what *stages* says of it. No other
    process takes part: what the other ranks of a stage say is what this one says.
    """
    holders = [range(first, first + plan.world_size // len(stages)) for first in _starts(plan, len(stages))]
    (own,) = [index for index, ranks in enumerate(holders) if rank in ranks]
    texts = [Planner().describe_as(stage, lambda stage=stage: held_of(plan, stage)) for stage in stages]  # type: ignore[misc]
    planner = Planner()

    def planned() -> tuple[SavePlan, int]:
        """Return the plan of a save and how many bytes are exchanged for it."""
        if state is None:
            text = planner.describe_as(dict(stages[own]), lambda: held_of(plan, stages[own]))
        else:
            text = planner.describe(state, RankGroup())
        said = [text if index == own else other for index, other in enumerate(texts)]
        digest = digest_of(text)
        digests = [digest if index == own else digest_of(other) for index, other in enumerate(texts)]
        classes = alike([digests[index] for index, ranks in enumerate(holders) for _ in ranks])
        sent = len(json.dumps(digest)) + len(json.dumps(classes))
        if len(classes) > 1:
            sent += sum(nbytes for _, nbytes in classes)
        made = planner.plan([([ranks], text) for ranks, text in zip(holders, said, strict=True)], rank)
        if state is not None:
            pieces_of(state, made)
        return made, sent

    with _cpu() as first:
        made, exchanged = planned()
    repeated: list[float] = []
    for _ in range(_REPEATS):
        with _cpu() as again:
            planned()
        repeated += again
    with tempfile.TemporaryDirectory(prefix="nemo_dist_plan_") as name:
        folder = Path(name)
        with _cpu() as written:
            manifest.write(folder, files_of(plan, 1 << 33), made.tensors, _about(plan, made.tensors))
        nbytes = (folder / manifest.NAME).stat().st_size
        with _cpu() as load:
            plan_load(Manifest.read(folder), planner, rank)
    return PlanningCost(
        save_planning_cpu_s=first[0],
        repeated_planning_cpu_s=median(repeated),
        exchanged_bytes=exchanged,
        manifest_bytes=nbytes,
        manifest_cpu_s=written[0],
        load_planning_cpu_s=load[0],
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    )


def _starts(plan: MeshPlan, stages: int) -> Iterable[int]:
    splitting = plan.splitting(Role.LAYERS)
    if stages != splitting:
        raise ValueError(f"stages must be those of the {splitting} that the plan has (got {stages})")
    return range(0, plan.world_size, plan.world_size // stages)


def plan_load(stored: Manifest, planner: Planner, rank: int) -> int:
    """Find all that *rank* verifies and reads of a checkpoint of its own topology; return how many slices it reads."""
    expected = sum(1 for tensor in stored.tensors.values() for _ in tensor.in_file(rank))
    wanted = [(name, chunk) for name, held in planner.held.items() for chunk in held.chunks_of(rank)]
    read = [piece for name, chunk in wanted for piece in stored.slices(name, chunk)]
    if expected and not read:
        raise RuntimeError(f"rank {rank} has written {expected} chunks and reads none")
    return len(read)


def files_of(plan: MeshPlan, nbytes: int) -> list[dict[str, Any]]:
    """Return the lines of the files of all ranks, as long as real ones, for files of *nbytes* that need not exist."""
    names = map(manifest.file_name, range(plan.world_size))
    return [
        {"name": name, "bytes": nbytes, "crc32": zlib.crc32(name.encode()), "dp_rank": plan.dp_rank(rank)}
        for rank, name in enumerate(names)
    ]


def _about(plan: MeshPlan, tensors: Iterable[str]) -> dict[str, Any]:
    """Return what a save of AdamW says besides tensors, without what the user adds."""
    parameters = list(dict.fromkeys(name.partition("/")[2] for name in tensors))
    options = {"lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "amsgrad": False, "maximize": False}
    return {
        "versions": {},
        "model": "LlamaForCausalLM",
        "optimizer": "AdamW",
        "topology": {axis.name: axis.size for axis in plan.wide},
        "plugins": {},
        "schedulers": [],
        "extra": None,
        "data": None,
        "step": 100,
        "counts": [[{"step": 100}, parameters]],
        "options": [[options, parameters]],
    }


@contextmanager
def _cpu() -> Iterator[list[float]]:
    """Yield a list that has, at the end, the seconds of CPU that the with-block took."""
    taken: list[float] = []
    start = process_time()
    yield taken
    taken.append(process_time() - start)
