"""Save a run: every rank writes its share of the canonical state, and the folder appears when it is complete."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import attrs
import torch
import transformers
from torch import Tensor

from nemo_dist.checkpoint import async_save, manifest, rng_state
from nemo_dist.checkpoint.atomic_dir import written_beside
from nemo_dist.checkpoint.chunks import Box, Entry, describe, pieces, survey
from nemo_dist.checkpoint.hf_side_files import write_companions
from nemo_dist.checkpoint.hf_weight_conversion import plain_class, refuse_unplain
from nemo_dist.checkpoint.json_state import to_json
from nemo_dist.checkpoint.manifest import Piece, Stored, key
from nemo_dist.checkpoint.optimizer_state import by_value, counts, moments, named, options, scheduler_state
from nemo_dist.checkpoint.safetensors_writer import SafetensorsFile
from nemo_dist.checkpoint.state_dict import exported, own_state
from nemo_dist.mesh.rank_group import Team

if TYPE_CHECKING:
    from nemo_dist.training.runtime import Runtime

MODEL = "model/"
OPTIMIZER = "optimizer."
IDENTITY = "hf"  # the folder with config and tokenizer, for an export without the ranks


def save(
    runtime: Runtime,
    path: str | os.PathLike[str],
    optimizer: Any = None,
    *,
    extra: Any = None,
    schedulers: Sequence[Any] = (),
    data: Any = None,
    asynchronous: bool = False,
    step: int | None = None,
    committed: Callable[[], None] = lambda: None,
) -> async_save.Save:
    """Save the run; see :meth:`nemo_dist.Runtime.save`. *committed* runs on one rank when the checkpoint is there."""
    async_save.finish()
    team = Team.of(runtime.mesh)
    with team.agreed("collecting the state of the run"):
        found = _Found.on_this_rank(runtime, optimizer, data)
        about = _about(runtime, optimizer, extra, schedulers) | {"step": _step(extra) if step is None else step}
    kinds = sorted({kind for kinds in team.tell("the moments of the optimizer", list(found.moments)) for kind in kinds})
    with team.agreed("collecting what to save"):
        state, mine = found.canonical(runtime, kinds), found.described
    answers = team.gather({**mine, "tensors": describe(state)})
    with team.agreed("planning the save"):
        entries = survey([answer.pop("tensors") for answer in answers])
        work = _Work.plan(team, runtime, path, state, entries)
        joined = _joined(answers) | about
        if asynchronous:
            work = work.copied()
    under_way = async_save.begin(lambda: work.run(joined, committed))
    if not asynchronous:
        under_way.wait()
    return under_way


@attrs.frozen(kw_only=True)
class _Found:
    """What this rank has: tensors laid out like parameters, by name; the rest ``described`` as JSON."""

    own: Mapping[str, Tensor]
    moments: Mapping[str, Mapping[str, Tensor]]
    described: Mapping[str, Any]

    @classmethod
    def on_this_rank(cls, runtime: Runtime, optimizer: Any, data: Any) -> _Found:
        refuse_unplain(runtime.parts[0])
        own = own_state(runtime)
        described: dict[str, Any] = {
            "dp_rank": runtime.dp_rank,
            "generators": to_json(rng_state.capture(), "the generators"),
            "data": None if data is None else to_json(data.state_dict(), "the state of data"),
        }
        if optimizer is None:
            return cls(own=own, moments={}, described=described)
        parameters = named(optimizer, {name: p for name, p in own.items() if isinstance(p, torch.nn.Parameter)})
        described |= {"counts": counts(optimizer, parameters), "options": options(optimizer, parameters)}
        return cls(own=own, moments=moments(optimizer, parameters), described=described)

    def canonical(self, runtime: Runtime, kinds: Sequence[str]) -> dict[str, Tensor]:
        """Return the canonical state; every rank goes through all *kinds*, as a plugin may communicate for each."""
        state = {MODEL + name: tensor for name, tensor in exported(runtime, self.own).items()}
        for kind in kinds:
            tensors = exported(runtime, self.moments.get(kind, {}))
            state |= {f"{OPTIMIZER}{kind}/{name}": tensor for name, tensor in tensors.items()}
        return state


def _joined(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what is kept of the ranks' answers: per rank what differs, and once what belongs to parameters."""
    joined: dict[str, Any] = {
        "ranks": [{name: answer[name] for name in ("dp_rank", "generators", "data")} for answer in answers]
    }
    if "counts" in answers[0]:
        joined["counts"] = by_value([_turned(answer["counts"]) for answer in answers])
        joined["options"] = by_value([answer["options"] for answer in answers])
    return joined


def _turned(counts: Mapping[str, Any]) -> list[Any]:
    return [[value, [name]] for name, value in counts.items()]


def _about(runtime: Runtime, optimizer: Any, extra: Any, schedulers: Sequence[Any]) -> dict[str, Any]:
    """Return what is the same on every rank: who wrote it, of which model, under which topology, and the extras."""
    setup = runtime.setup
    return {
        "versions": {
            "nemo_dist": importlib.metadata.version("nemo-dist"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "model": plain_class(runtime.parts[0]).__name__,
        "optimizer": None if optimizer is None else type(optimizer).__name__,
        "topology": topology(runtime),
        "plugins": {plugin.name: _version(type(plugin).__module__.partition(".")[0]) for plugin in setup.plugins},
        "schedulers": [to_json(scheduler_state(scheduler), "the state of a scheduler") for scheduler in schedulers],
        "extra": to_json(extra, "extra"),
    }


def _step(extra: Any) -> int | None:
    found = extra.get("step") if isinstance(extra, Mapping) else None
    return found if type(found) is int else None


def topology(runtime: Runtime) -> dict[str, Any]:
    """Return the sizes that say which rank has which part, and the strategy."""
    axes = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")
    strategy = runtime.setup.strategy
    return {axis: runtime.mesh.size(axis) for axis in axes} | {"strategy": strategy.name if strategy else None}


@lru_cache
def _version(package: str) -> str | None:
    """Return the version of the distribution that has *package*; asked once, as all that is installed is searched."""
    owners = importlib.metadata.packages_distributions().get(package, [])
    return importlib.metadata.version(owners[0]) if owners else None


@attrs.frozen(kw_only=True)
class _Work:
    """What is left to do when the state is known, and may be done in the background: nothing here is collective."""

    team: Team
    model: Any
    path: str | os.PathLike[str]
    writers: Mapping[str, Mapping[Box, int]]
    entries: Mapping[str, Entry]
    mine: Mapping[str, Tensor]

    @classmethod
    def plan(
        cls, team: Team, runtime: Runtime, path: Any, state: Mapping[str, Tensor], entries: Mapping[str, Entry]
    ) -> _Work:
        writers = share_out(entries, team.size)
        mine = {
            key(name, box): values
            for name, tensor in state.items()
            for box, values in pieces(tensor)
            if writers[name][box] == team.rank
        }
        return cls(team=team, model=runtime.parts[0], path=path, writers=writers, entries=entries, mine=mine)

    def copied(self) -> _Work:
        """Return this work on copies in host memory, that training does not change."""
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.mine.items()}
        return attrs.evolve(self, mine=copies, team=self.team.in_background())

    def run(self, about: Mapping[str, Any], committed: Callable[[], None]) -> None:
        """Write this rank's file and, on the first rank, the manifest; then put the folder in place."""
        with written_beside(self.team, self.path, "the checkpoint", stale=lambda name: True) as folder:
            with self.team.agreed(f"writing the tensors to {folder}"):
                file = self._write_file(folder)
            files = self.team.tell("the files of the checkpoint", file)
            if self.team.first:
                tensors = {name: self._stored(name) for name in sorted(self.entries)}
                write_companions(folder / IDENTITY, self.model)
                manifest.write(folder, files, tensors, about)
        with self.team.agreed("finishing the save"):
            if self.team.first:
                committed()

    def _write_file(self, folder: Any) -> dict[str, Any]:
        name = f"rank-{self.team.rank:05d}.safetensors"
        layouts = {piece: (tuple(tensor.shape), tensor.dtype) for piece, tensor in self.mine.items()}
        with SafetensorsFile(folder / name, layouts) as file:
            for piece in file.slots:
                file.write(piece, self.mine[piece])
        return {"name": name, "bytes": file.nbytes, "crc32": file.checksum}

    def _stored(self, name: str) -> Stored:
        entry = self.entries[name]
        return Stored(entry.shape, entry.dtype, [Piece(box, rank) for box, rank in self.writers[name].items()])


def share_out(entries: Mapping[str, Entry], ranks: int) -> dict[str, dict[Box, int]]:
    """Say which rank writes each box: of those that hold it, the one with the least to write so far."""
    load = [0] * ranks
    writers: dict[str, dict[Box, int]] = {}
    for name, entry in entries.items():
        writers[name] = {}
        for box, holders in entry.holders.items():
            writer = min(holders, key=lambda rank: (load[rank], rank))
            load[writer] += box.numel * entry.dtype.itemsize
            writers[name][box] = writer
    return writers
