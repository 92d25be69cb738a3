"""Rehearse a save and a load of a run as one of its ranks: the real functions, up to where bytes would be written."""

from __future__ import annotations

import tempfile
from pathlib import Path

import attrs
from torch.optim import Optimizer

from nemo_dist.checkpoint.manifest import NAME, Manifest
from nemo_dist.checkpoint.planning_cost import files_of, plan_load
from nemo_dist.checkpoint.save import Work, collect, plan_save
from nemo_dist.checkpoint.sharded_model import ShardedModel
from nemo_dist.dry_run.phases import Phases
from nemo_dist.mesh.store_consensus import imagined
from nemo_dist.planning.mesh_plan import MeshPlan
from nemo_dist.plugin.comm_estimate import readable

_FIRST, _AGAIN, _LOAD = "plan a save", "plan it again", "plan a load"


@attrs.frozen(kw_only=True)
class CheckpointPlan:
    """What a save and a load cost this rank before bytes are written or read, measured.

    ``exchanged_bytes``: what this rank sends of metadata in a save. ``files``: of all ranks. ``written_bytes``: in the
    file of this rank.
    """

    save_planning_cpu_s: float
    repeated_planning_cpu_s: float
    exchanged_bytes: int
    manifest_bytes: int
    load_planning_cpu_s: float
    peak_rss_bytes: int
    files: int
    written_bytes: int

    @classmethod
    def rehearse(cls, plan: MeshPlan, sharded: ShardedModel, optimizer: Optimizer, phases: Phases) -> CheckpointPlan:
        """Plan two saves of the run on *plan*, write the manifest of the second, and plan to load it."""
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder)

            def planned(collecting: str, planning: str) -> Work:
                with phases.measured(collecting):
                    found = collect(sharded, target, optimizer)
                    canonical = found.canonical(sharded)
                with phases.measured(planning):
                    return plan_save(sharded, target, found, lambda: canonical)[0]

            sent = imagined.sent
            planned("collect the state", _FIRST)
            exchanged = imagined.sent - sent
            work = planned("collect it again", _AGAIN)
            with phases.measured("write the manifest"):
                written = sum(tensor.nbytes for tensor in work.mine.values())
                work.write_manifest(target, files_of(plan, written))
            with phases.measured(_LOAD):
                plan_load(Manifest.read(target), sharded.planner, sharded.ranks.rank)
            return cls(
                save_planning_cpu_s=phases.cpu(_FIRST),
                repeated_planning_cpu_s=phases.cpu(_AGAIN),
                exchanged_bytes=exchanged,
                manifest_bytes=(target / NAME).stat().st_size,
                load_planning_cpu_s=phases.cpu(_LOAD),
                peak_rss_bytes=max(phase.peak_rss_bytes for phase in phases.done),
                files=plan.world_size,
                written_bytes=written,
            )

    def lines(self) -> list[str]:
        """Return what the report says of it."""
        return [
            f"  a save writes   {readable(self.written_bytes):>12}  in 1 of {self.files} files; the manifest has "
            f"{readable(self.manifest_bytes)}",
            f"  ranks exchange  {readable(self.exchanged_bytes):>12}  of metadata each",
        ]
