"""The folder with the checkpoints of one run: which ones to keep, and which one to resume from."""

from __future__ import annotations

import os
import re
import signal
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from nemo_dist.checkpoint import async_save
from nemo_dist.checkpoint.atomic_dir import Staging, discard, folder_at, sync
from nemo_dist.checkpoint.folder_lock import claim
from nemo_dist.checkpoint.load import intact, load_from
from nemo_dist.checkpoint.manifest import NAME, Manifest
from nemo_dist.checkpoint.preemption import CODE, stop_request
from nemo_dist.checkpoint.save import save
from nemo_dist.checkpoint.sharded_model import Holder
from nemo_dist.errors import CheckpointError, RankError
from nemo_dist.mesh.rank_group import RankGroup
from nemo_dist.planning.validation import integer

_NAME = re.compile(r"step-([0-9]{8,19})")
_LARGEST = 2**63 - 1  # of the steps: what most programs count to
_LEFT = re.compile(r"\.step-[0-9]{8,}\.(removed|partial|old|lock)")  # what an interrupted save or removal leaves
_LATEST = "latest"
_LOCK = ".lock"


def _count(_: object, attribute: attrs.Attribute[Any], value: object) -> None:
    integer(attribute.name, value)


_at_least_one = attrs.validators.optional(_count)


@attrs.frozen
class RunFolder:
    """A folder with one checkpoint per saved step (``step-00000100``), and a file ``latest`` that names the newest.

    ``keep_last``: how many of the newest are kept; None keeps all. ``keep_every``: checkpoints of steps that it divides
    are never removed. The newest is never removed, nor, with ``check_finite``, the newest that has only finite weights
    (see ``Runtime.save``).
    """

    path: Path = attrs.field(converter=folder_at)
    keep_last: int | None = attrs.field(default=None, validator=_at_least_one, kw_only=True)
    keep_every: int | None = attrs.field(default=None, validator=_at_least_one, kw_only=True)
    check_finite: bool = attrs.field(default=True, kw_only=True)

    def save(
        self,
        runtime: Holder,
        optimizer: Any = None,
        *,
        step: int,
        extra: Any = None,
        schedulers: Sequence[Any] = (),
        data: Any = None,
        asynchronous: bool = False,
    ) -> async_save.Save:
        """Save the run as checkpoint *step*, then update ``latest`` and remove checkpoints not to keep; collective.

        The process of the first rank then has the folder for itself as long as it lives: another run that saves there
        gets a CheckpointError. Arguments and errors as for ``Runtime.save``.
        """
        integer("step", step, 0, _LARGEST)
        where = self._folder(step)
        return save(
            runtime.sharded,
            where,
            optimizer,
            step=step,
            extra=extra,
            schedulers=schedulers,
            data=data,
            asynchronous=asynchronous,
            check_finite=self.check_finite,
            committed=lambda: self._committed(where),
            prepare=self._prepare,
        )

    def save_if_preempted(
        self,
        runtime: Holder,
        optimizer: Any = None,
        *,
        step: int,
        extra: Any = None,
        schedulers: Sequence[Any] = (),
        data: Any = None,
        signals: Sequence[int] = (signal.SIGTERM,),
        grace_seconds: float = 300,
    ) -> None:
        """Save and end all ranks with exit code 75 if one of them was sent one of *signals*; call it after every step.

        From the first call on the signal no longer ends the process. At the next call after it all ranks save the same
        *step*, then raise SystemExit with 75 (``EX_TEMPFAIL``: run the job again). A process that has not ended
        *grace_seconds* after the signal ends with that code by itself, as in a step that waits for a dead rank.
        Collective: one all-reduce of an integer. Arguments and errors as for ``save``.
        """
        stop_request.listen(tuple(map(int, signals)), grace_seconds)
        if not runtime.sharded.ranks.total([stop_request.name is not None])[0]:
            return
        try:
            async_save.finish()
        except Exception as error:  # there is no later step that could save
            warnings.warn(f"an earlier asynchronous save failed: {error}", stacklevel=2)
        self.save(runtime, optimizer, step=step, extra=extra, schedulers=schedulers, data=data)
        if runtime.sharded.ranks.first:
            sys.stderr.write(f"nemo_dist: saved step {step} in {self.path}, as a signal asked the job to end\n")
        raise SystemExit(CODE)

    def resume(
        self, runtime: Holder, optimizer: Any = None, *, schedulers: Sequence[Any] = (), data: Any = None
    ) -> tuple[int, Any] | None:
        """Load the newest checkpoint that is undamaged; return its step and ``extra``, or None when there is none.

        A damaged checkpoint causes a warning, and the one before it is tried. Collective; arguments as for
        ``Runtime.load``. Raises CheckpointError when all are damaged, or when the newest undamaged one does not fit the
        model.
        """
        found = self.newest_intact(runtime.sharded.ranks)
        if found is None:
            return None
        step, manifest = found
        return step, load_from(runtime.sharded, manifest, optimizer, schedulers=schedulers, data=data)

    def newest_intact(self, ranks: RankGroup) -> tuple[int, Manifest] | None:
        """Return step and manifest of the newest checkpoint that is undamaged, None when there is none; collective.

        Warns of damaged ones that are newer. Raises CheckpointError when all are damaged.
        """
        async_save.finish()
        listed = ranks.decide(f"listing {self.path}", lambda: self._newest_first(self.steps()), lambda found: found[:1])
        steps = listed[0]
        for step in steps:
            try:
                return step, intact(ranks, self._folder(step))
            except (CheckpointError, RankError) as error:
                warnings.warn(f"step {step} of {self.path} is left out: {error}", stacklevel=3)
        if steps:
            raise CheckpointError(f"none of the checkpoints in {self.path} is whole: steps {steps}")
        return None

    def try_to_write(self) -> None:
        """Write and remove a file in the folder, which is made; raise OSError where that fails, as it would later."""
        self.path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.path) as file:
            file.write(b"0")
            file.flush()

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, complete or not, ascending."""
        if not self.path.is_dir():
            return []
        folders = {entry.name for entry in self.path.iterdir() if entry.is_dir()}
        # Of a commit that was interrupted between its two renames, which ``recover`` finishes.
        whole = folders | {
            name[1:-4] for name in folders if f"{name[:-4]}.partial" in folders and name.endswith(".old")
        }
        found = [(name, int(name[1])) for name in map(_NAME.fullmatch, whole) if name]
        return sorted(step for name, step in found if name[0] == self._folder(step).name)

    def latest(self) -> Path | None:
        """Return the newest checkpoint with a valid manifest and files of the right size, or None.

        The content of the files is not verified.
        """
        for step in self._newest_first(self.steps()):
            try:
                Staging.beside(self._folder(step)).recover()
                manifest = Manifest.read(self._folder(step))
                manifest.look_for_files()
                return manifest.folder
            except (CheckpointError, OSError):
                continue
        return None

    def _newest_first(self, steps: list[int]) -> list[int]:
        """Sort *steps*, newest first, but those last that are from before the run resumed at an earlier step.

        ``latest`` names these after the newest, or is newer than they are. A step beyond it that is newer still was put
        in place by a job that was killed before it could name that.
        """
        pointed, *left = _read_steps(self.path / _LATEST) or [_LARGEST]
        old = {step for step in steps if step > pointed and (step in left or not self._newer_than_latest(step))}
        return sorted(steps, key=lambda step: (step in old, -step))

    def _newer_than_latest(self, step: int) -> bool:
        try:
            return (self._folder(step) / NAME).stat().st_mtime_ns > (self.path / _LATEST).stat().st_mtime_ns
        except OSError:
            return False

    def _folder(self, step: int) -> Path:
        return self.path / f"step-{step:08d}"

    def _committed(self, where: Path) -> None:
        newest = int(where.name.removeprefix("step-"))
        left = [self._folder(step) for step in self.steps() if step > newest]
        beside = self.path / f".{_LATEST}.partial"
        beside.write_text("".join(f"{folder.name}\n" for folder in (where, *left)))
        sync(beside)
        beside.rename(self.path / _LATEST)
        sync(self.path)
        self._prune(newest)

    def _prepare(self) -> None:
        """Keep other runs out, and tidy up what interrupted saves have left, which may be all the room there is."""
        claim(self.path / _LOCK, self.path)
        for step in self.steps():
            Staging.beside(self._folder(step)).recover()
        for left in [entry for entry in self.path.iterdir() if _LEFT.fullmatch(entry.name)]:
            if left.suffix == ".lock":
                left.unlink()
            elif left.suffix != ".old" or (self.path / left.stem[1:]).exists():
                discard(left)

    def _prune(self, newest: int) -> None:
        if self.keep_last is None:
            return
        older = [step for step in self.steps() if step < newest]
        kept = older[max(0, len(older) - self.keep_last + 1) :]
        if self.check_finite and not any(map(self._finite, (newest, *kept))):
            kept += [step for step in older if self._finite(step)][-1:]
        for step in older:
            if step in kept or (self.keep_every is not None and step % self.keep_every == 0):
                continue
            # Renamed before its files are removed, so that an interrupted removal leaves no incomplete checkpoint.
            doomed = self.path / f".step-{step:08d}.removed"
            discard(doomed)
            os.rename(self._folder(step), doomed)
            discard(doomed)

    def _finite(self, step: int) -> bool:
        """Whether checkpoint *step* can be read and has only finite weights; True where they were not checked."""
        try:
            manifest = Manifest.read(self._folder(step))
            manifest.look_for_files()
            return not manifest.not_finite
        except (CheckpointError, OSError):
            return False


def _read_steps(pointer: Path) -> list[int]:
    """Return the steps that the file *pointer* names, the newest first; none where it makes no sense."""
    try:
        found = [_NAME.fullmatch(line) for line in pointer.read_text().split()] if pointer.is_file() else []
    except (OSError, UnicodeDecodeError):
        return []
    return [int(name[1]) for name in found if name] if all(found) else []
