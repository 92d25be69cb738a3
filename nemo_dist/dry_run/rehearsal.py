"""Rehearse a run as one of its ranks, and say what that rank would hold, read and write."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import attrs
import torch

from nemo_dist.dry_run.checkpoint_plan import CheckpointPlan
from nemo_dist.dry_run.holdings import Holdings, stepped
from nemo_dist.dry_run.imagined_world import imagined_world
from nemo_dist.dry_run.phases import Phase, Phases
from nemo_dist.errors import NemoDistError
from nemo_dist.hf_model import class_name
from nemo_dist.models.meta_model import meta_model, read_config
from nemo_dist.plugin.comm_estimate import readable
from nemo_dist.plugin.mixed_precision import dtype_name, storage_dtype
from nemo_dist.setup.setup import DistributedSetup


@attrs.frozen(kw_only=True)
class DryRun:
    """What one rank of a run would do; as a string it is what ``nemo-dist dry-run`` prints.

    ``parameters``: elements of the whole model, which are stored in ``dtype``. ``groups``: the size of the process
    group of this rank along each axis and flattened name of the mesh. ``plugins``: what each plugin does, a pipeline's
    schedule among it. ``checkpoint`` is None where a save could not be rehearsed, and ``why_no_checkpoint`` says why.
    """

    model: str
    dtype: str
    parameters: int
    world_size: int
    rank: int
    coordinates: Mapping[str, int]
    groups: Mapping[str, int]
    plugins: tuple[str, ...]
    holdings: Holdings
    phases: tuple[Phase, ...]
    checkpoint: CheckpointPlan | None = None
    why_no_checkpoint: str = ""

    def data(self) -> dict[str, Any]:
        """Return everything as plain values."""
        found: dict[str, Any] = attrs.asdict(self)
        return {**found, "cpu_s": self.cpu_s, "peak_rss_bytes": self.peak_rss_bytes}

    @property
    def cpu_s(self) -> float:
        """The CPU seconds of all phases."""
        return sum(phase.cpu_s for phase in self.phases)

    @property
    def peak_rss_bytes(self) -> int:
        """The most memory that any phase held."""
        return max(phase.peak_rss_bytes for phase in self.phases)

    def __str__(self) -> str:
        place = ", ".join(f"{axis} {index}" for axis, index in self.coordinates.items())
        held = self.holdings
        lines = [
            f"{self.model}, {self.parameters / 1e9:.4g} billion parameters in {self.dtype}, as rank {self.rank} of "
            f"{self.world_size} ({place or 'alone'})",
            f"  parameters      {readable(held.parameter_bytes):>12}",
            f"  gradients       {readable(held.gradient_bytes):>12}",
            f"  AdamW           {readable(held.optimizer_bytes):>12}",
            f"  read at load    {readable(held.read_bytes):>12}",
            "  groups          " + ", ".join(f"{name} {size}" for name, size in self.groups.items()),
            *(f"  {line}" for line in self.plugins),
        ]
        if self.checkpoint is not None:
            lines += self.checkpoint.lines()
        else:
            lines.append(f"  a save was not rehearsed: {self.why_no_checkpoint}")
        lines.append("what the rehearsal took:")
        lines += [f"  {p.name:<28} {p.cpu_s:7.2f} s   {readable(p.peak_rss_bytes):>10}" for p in self.phases]
        return "\n".join(lines)


def dry_run(
    options: Mapping[str, Any],
    model: str | os.PathLike[str],
    world_size: int,
    rank: int | None = None,
    checkpoint: bool = True,
    dtype: str | torch.dtype | None = None,
) -> DryRun:
    """Rehearse ``DistributedSetup.build(**options, world_size=world_size)`` with *model*, as *rank*, and AdamW.

    *model*: a folder with a ``config.json``, or such a file; no weights are read. Nothing is written but what a save
    would tell the others, into a temporary folder. ``rank``: of the world; None is the first one of the setup.
    ``checkpoint``: whether to plan a save and a load. ``dtype``: that parameters are stored in; None is that of the
    model's config, in which ``from_pretrained`` loads it unless it is told another.

    Raises RankError for a rank that the world or the setup does not have, ValueError for a *dtype* that is none, and
    what ``build`` and loading raise for a setup or a model that they refuse.
    """
    phases = Phases()
    with phases.measured("set up the mesh"):
        setup = DistributedSetup.build(**options, world_size=world_size)
        config = read_config(model)
        stored = _stored(dtype, config)
    chosen = rank if rank is not None else setup.ranks[0] if setup.ranks else 0
    with imagined_world(world_size, chosen):
        place = setup.place_of(chosen)
        with phases.measured("make the groups"):
            mesh = setup.mesh_context
        with phases.measured("build the model on meta"):
            whole = meta_model(config, stored)
            parameters = sum(parameter.numel() for parameter in whole.parameters())
        plugins = tuple(setup.calls.explain(plan=setup.plan, model=whole))  # while it is whole
        with phases.measured("split and shard it"):
            parts = setup.shard(whole)
        with phases.measured("step AdamW"):
            optimizer = stepped(parts, torch.optim.AdamW)
        with phases.measured("plan what to read"):
            holdings = Holdings.of(parts, optimizer)
        plan, why = None, "it was not asked for"
        if checkpoint:
            try:
                plan = CheckpointPlan.rehearse(setup.plan, setup.sharded(parts), optimizer, phases)
            except NemoDistError as error:
                why = str(error)
        names = dict.fromkeys((*mesh.wide(), *mesh.flattened))
        return DryRun(
            model=class_name(whole),
            dtype=dtype_name(stored),
            parameters=parameters,
            world_size=world_size,
            rank=chosen,
            coordinates={axis: index for axis, index in setup.plan.coordinates(place).items() if mesh.size(axis) > 1},
            groups={name: mesh.size(name) for name in names if mesh.size(name) > 1},
            plugins=plugins,
            holdings=holdings,
            phases=tuple(phases.done),
            checkpoint=plan,
            why_no_checkpoint="" if plan is not None else why,
        )


def _stored(dtype: str | torch.dtype | None, config: Any) -> torch.dtype:
    if dtype is None:
        return config.dtype or torch.float32  # as meta_model
    found: torch.dtype = getattr(torch, storage_dtype("dtype", dtype))
    return found
