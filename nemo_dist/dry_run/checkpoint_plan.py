"""Rehearse a save and a load of a run as one of its ranks: the real functions, up to where bytes would be written."""

from __future__ import annotations

import tempfile
import zlib
from pathlib import Path
from typing import Any
from unittest.mock import patch

import attrs
from torch.optim import Optimizer

from nemo_dist.checkpoint.manifest import NAME, Manifest, file_name
from nemo_dist.checkpoint.planning_cost import plan_load
from nemo_dist.checkpoint.save import _Work, save
from nemo_dist.checkpoint.sharded_model import ShardedModel
from nemo_dist.dry_run.phases import Phases
from nemo_dist.mesh.store_consensus import imagined
from nemo_dist.plugin.comm_estimate import readable


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
    def rehearse(cls, sharded: ShardedModel, optimizer: Optimizer, phases: Phases) -> CheckpointPlan:
        """Plan two saves of the run, write the manifest of one, and plan to load it."""
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "checkpoint"
            sent = imagined.sent
            with phases.measured("plan a save"):
                work = _planned(sharded, target, optimizer)
            exchanged = imagined.sent - sent
            with phases.measured("plan it again"):
                work = _planned(sharded, target, optimizer)
            with phases.measured("write the manifest"):
                target.mkdir()
                written = sum(tensor.nbytes for tensor in work.mine.values())
                files = _files(target, sharded.ranks.size, written)
                work._write_manifest(target, files)
            with phases.measured("plan a load"):
                plan_load(Manifest.read(target), sharded.planner, sharded.ranks.rank)
            return cls(
                save_planning_cpu_s=phases.cpu("plan a save"),
                repeated_planning_cpu_s=phases.cpu("plan it again"),
                exchanged_bytes=exchanged,
                manifest_bytes=(target / NAME).stat().st_size,
                load_planning_cpu_s=phases.cpu("plan a load"),
                peak_rss_bytes=max(phase.peak_rss_bytes for phase in phases.done),
                files=len(files),
                written_bytes=written,
            )

    def lines(self) -> list[str]:
        """Return what the report says of it."""
        return [
            f"  a save writes   {readable(self.written_bytes):>12}  in 1 of {self.files} files; the manifest has "
            f"{readable(self.manifest_bytes)}",
            f"  ranks exchange  {readable(self.exchanged_bytes):>12}  of metadata each",
        ]


def _planned(sharded: ShardedModel, target: Path, optimizer: Optimizer) -> Any:
    """Return the work of a save of this rank, which ``save`` would run next."""
    kept: list[Any] = []
    with patch.object(_Work, "run", lambda work, *_: kept.append(work)):
        save(sharded, target, optimizer)
    return kept[0]


def _files(folder: Path, count: int, nbytes: int) -> list[dict[str, Any]]:
    """Make the files of *count* ranks, without content but of the size *nbytes*, and return what ranks say of them."""
    found = []
    for rank in range(count):
        name = file_name(rank)
        with (folder / name).open("wb") as file:
            file.truncate(nbytes)
        found.append({"name": name, "bytes": nbytes, "crc32": zlib.crc32(name.encode()), "dp_rank": 0})
    return found
