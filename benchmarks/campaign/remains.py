"""What must be left of a run folder, whatever has happened."""

from __future__ import annotations

from nemo_dist import CheckpointError, RunFolder
from nemo_dist.checkpoint.atomic_dir import Staging
from nemo_dist.checkpoint.manifest import Manifest

_MOST = 12  # entries of a folder that keeps a few checkpoints


def wrong_with(folder: RunFolder, durable: int) -> str:
    """Return what is wrong in *folder*, in which *durable* or a later step must be the newest; every byte is read."""
    newest = folder.latest()
    if newest is None or int(newest.name.removeprefix("step-")) < durable:
        return f"the newest checkpoint is {newest}, though step {durable} was durable"
    for step in folder.steps():
        place = folder.path / f"step-{step:08d}"
        try:
            Staging.beside(place).recover()
            manifest = Manifest.read(place)
            manifest.verify_companions()
            for index in range(len(manifest.files)):
                manifest.verify(index)
        except CheckpointError as error:
            return f"step {step} is not whole: {error}"
    left = sorted(entry.name for entry in folder.path.iterdir())
    return f"{len(left)} entries pile up: {left}" if len(left) > _MOST else ""
