"""Flip single bits of every file of a checkpoint, and cut files short."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch

from campaign.forks import call
from campaign.tally import Tally
from campaign.tiny_run import TinyRun, checksum
from nemo_dist import CheckpointError, RankError, RunFolder, export_checkpoint


def run(count: int, chance: Random, folder: Path) -> Iterator[Tally]:
    """Yield the counts for flips, cuts and what an offline export makes of flips."""
    for name, damage, use in (
        ("flip a bit, load", flip, load),
        ("cut a file, load", cut, load),
        ("flip a bit, nemo-dist export", flip, export),
        ("flip a bit, resume from a run folder", flip, resume),
    ):
        share = count if use is load and damage is flip else max(1, count // 10)
        yield call(1, on_rank_damage, name, damage, use, share, chance, folder / name.replace(" ", "-"))[0]


def flip(content: bytes, chance: Random) -> bytes:
    """Return *content* with one bit flipped."""
    flipped = bytearray(content)
    flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
    return bytes(flipped)


def cut(content: bytes, chance: Random) -> bytes:
    """Return the start of *content*, or more than it."""
    return content[: chance.randrange(len(content))] if chance.random() < 0.8 else content + b"\0"


def load(run: TinyRun, folder: Path) -> int:
    """Load the checkpoint; return a digest of the run."""
    run.runtime.load(folder / "run" / "step-00000002", run.optimizer, **run.also)
    run.step = 2
    return run.digest()


def export(run: TinyRun, folder: Path) -> int:
    """Export the checkpoint; return a digest of the files."""
    out = folder / "exported"
    shutil.rmtree(out, ignore_errors=True)
    try:
        export_checkpoint(folder / "run" / "step-00000002", out)
        return hash(tuple((path.name, path.read_bytes()) for path in sorted(out.iterdir())))
    except BaseException:
        if out.exists():
            raise AssertionError("a refused export has left a folder") from None
        raise


def resume(run: TinyRun, folder: Path) -> int:
    """Resume from the run folder, which takes the checkpoint before; return a digest of the run."""
    run.resume(RunFolder(folder / "run"))
    if run.step == 1:
        raise CheckpointError("the one before was taken")
    return run.digest()


def on_rank_damage(
    tell: Callable[..., None],
    name: str,
    damage: Callable[[bytes, Random], bytes],
    use: Callable[[TinyRun, Path], int],
    count: int,
    chance: Random,
    folder: Path,
) -> Tally:
    """Damage a file, *use* the checkpoint, and mend the file; what is not refused must not matter."""
    warnings.simplefilter("ignore")
    tally, run = Tally(name), TinyRun()
    for _ in range(2):
        run.train()
        run.save(RunFolder(folder / "run"))
    right = use(run, folder)
    place = folder / "run" / "step-00000002"
    files = [path for path in sorted(place.rglob("*")) if path.is_file()]
    for index in range(count):
        file = files[index % len(files)]
        content = file.read_bytes()
        file.write_bytes(damage(content, chance))
        _scramble(run)
        before = checksum(run.tensors())
        where = file.relative_to(place).as_posix()
        try:
            found = use(run, folder)
            if found == right and (name := _harmless(content, file.read_bytes())):
                tally.survive(f"{where}: {name}")
            else:
                tally.lose(f"{where}: a damaged checkpoint was taken")
        except (CheckpointError, RankError):
            if use is not resume and checksum(run.tensors()) != before:
                tally.lose(f"{where}: refused, but the run has changed")
            else:
                tally.refuse()
        except BaseException as error:
            tally.lose(f"{where}: {type(error).__name__}: {error}")
        file.write_bytes(content)
    if use(run, folder) != right:
        tally.lose("the mended checkpoint is another one")
    return tally


def _scramble(run: TinyRun) -> None:
    with torch.no_grad():
        for weight in run.weights().values():
            weight.add_(1)


def _harmless(content: bytes, damaged: bytes) -> str:
    """Return why a difference does not matter, or nothing."""
    try:
        same: Any = json.loads(content) == json.loads(damaged)
    except ValueError:
        return ""
    return "other text of the same values" if same else ""
