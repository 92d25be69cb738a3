"""Save a run: every rank writes its share of the canonical state, and the complete folder is renamed into place."""

from __future__ import annotations

import importlib.metadata
import json
import os
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import attrs
import torch
import transformers
from torch import Tensor

from nemo_dist.checkpoint import async_save, manifest, rng_state
from nemo_dist.checkpoint.atomic_dir import write_folder
from nemo_dist.checkpoint.changed_optimizer import hides_state, makers, refuse_hidden_state
from nemo_dist.checkpoint.chunks import Chunk, Entry, chunks, describe, merged
from nemo_dist.checkpoint.equal_copies import Copies
from nemo_dist.checkpoint.hf_side_files import write_companions
from nemo_dist.checkpoint.hf_weight_conversion import refuse_unplain
from nemo_dist.checkpoint.host_copy import settle, to_host
from nemo_dist.checkpoint.json_state import to_json
from nemo_dist.checkpoint.manifest import Stored, StoredChunk, key
from nemo_dist.checkpoint.optimizer_state import by_value, counts, group_options, moments, named
from nemo_dist.checkpoint.safetensors_writer import SafetensorsFile
from nemo_dist.checkpoint.scheduler_state import scheduler_state
from nemo_dist.checkpoint.sharded_model import ShardedModel
from nemo_dist.checkpoint.state_dict import copies, exported, own_state
from nemo_dist.errors import CheckpointError
from nemo_dist.mesh.rank_group import RankGroup
from nemo_dist.mesh.store_consensus import brief, refuse_differences

# Prefixes of tensor names: "model/NAME", "optimizer.KIND/NAME" for moments, "plugin.PLUGIN.KIND/NAME".
MODEL = "model/"
OPTIMIZER = "optimizer."
PLUGIN = "plugin."
_FEW = 5  # names of weights that are not finite, per rank


def save(
    sharded: ShardedModel,
    path: str | os.PathLike[str],
    optimizer: Any = None,
    *,
    extra: Any = None,
    schedulers: Sequence[Any] = (),
    data: Any = None,
    asynchronous: bool = False,
    check_finite: bool = True,
    step: int | None = None,
    committed: Callable[[], None] = lambda: None,
    prepare: Callable[[], None] = lambda: None,
) -> async_save.Save:
    """Save the run; see :meth:`nemo_dist.Runtime.save`.

    On the first rank, *prepare* runs before anything is written, and *committed* after the rename.
    Each rank collects its state, all ranks exchange the metadata of it once, and then each writes its share.
    """
    async_save.finish()
    ranks = sharded.ranks
    found = _Collected()
    summaries = ranks.collect(
        "collecting the state of the run", lambda: found.take(sharded, path, optimizer, data, extra, schedulers, step)
    )
    refuse_differences("what to save", [summary["same"] for summary in summaries])
    _refuse_unequal_states([summary["shared"] for summary in summaries])
    made = makers(optimizer)
    refuse_hidden_state([summary["hidden"] for summary in summaries], made)
    prefixes = sorted({prefix for summary in summaries for prefix in summary["prefixes"]})
    with ranks.agreed("collecting what to save"):
        state = found.canonical(sharded, prefixes)
        described = describe(state)
    answers = ranks.gather({**found.of_rank, "tensors": described})
    with ranks.agreed("planning the save"):
        entries = merged([answer.pop("tensors") for answer in answers])
        copies_here = Copies.of(ranks.rank, {} if sharded.differing else state, entries, but=found.buffers)
        checked = found.weights if check_finite else frozenset()
        writers = share_out(entries, ranks.size, even=not sharded.differing)
        about = _joined(answers) | found.of_all
        work = _Work.plan(ranks, sharded.model, path, state, entries, writers, about, checked)
        if asynchronous:
            work = work.copied()
        settle(work.mine)  # the thread has a stream of its own
    if not sharded.differing:
        copies_here.compare(ranks, made)
    under_way = async_save.begin(lambda: work.run(prepare, committed))
    if not asynchronous:
        under_way.wait()
    return under_way


@attrs.define
class _Collected:
    """The state of the run on this rank.

    ``own``: parameters and persistent buffers by name. ``layers``: tensors that are laid out like parameters (an
    optimizer's moments, a plugin's tensors), by the prefix of their names in the checkpoint and parameter name.
    ``of_rank`` and ``of_all`` are JSON: what differs between ranks, and what is equal on all.
    """

    own: Mapping[str, Tensor] = attrs.field(factory=dict)
    layers: dict[str, Mapping[str, Tensor]] = attrs.field(factory=dict)
    of_rank: dict[str, Any] = attrs.field(factory=dict)
    of_all: dict[str, Any] = attrs.field(factory=dict)

    def take(
        self,
        sharded: ShardedModel,
        path: str | os.PathLike[str],
        optimizer: Any,
        data: Any,
        extra: Any,
        schedulers: Sequence[Any],
        step: int | None,
    ) -> dict[str, Any]:
        """Collect the state; return what all ranks must know before they go on.

        That is ``prefixes``, ``shared``, digests of plugins' states, ``same``, the arguments that must not differ, and
        ``hidden``, whether the optimizer shows no state though it should have some.
        """
        refuse_unplain(sharded.model)
        self.own = own_state(sharded)
        self.of_rank = {
            "dp_rank": sharded.batch,
            "generators": to_json(rng_state.capture(), "the generators"),
            "data": None if data is None else to_json(data.state_dict(), "the state of data"),
        }
        self.of_all = _about(sharded, optimizer, extra, schedulers) | {"step": _step(extra) if step is None else step}
        if optimizer is not None:
            self._take_optimizer(sharded, optimizer)
        shared = self._take_plugins(sharded)
        same = {name: brief(self.of_all[name]) for name in ("step", "optimizer", "schedulers", "extra")}
        same |= {"path": str(Path(path).expanduser().absolute()), "data": "given" if data is not None else "None"}
        hidden = optimizer is not None and hides_state(optimizer)
        return {"prefixes": list(self.layers), "shared": shared, "same": same, "hidden": hidden}

    def _take_optimizer(self, sharded: ShardedModel, optimizer: Any) -> None:
        parameters = named(optimizer, self.own, copies(sharded, self.own))
        self.of_rank |= {
            "counts": counts(optimizer, parameters),
            "options": group_options(optimizer, parameters),
        }
        self.layers |= {f"{OPTIMIZER}{kind}/": found for kind, found in moments(optimizer, parameters).items()}

    def _take_plugins(self, sharded: ShardedModel) -> dict[str, int]:
        """Collect the states of plugins; return a CRC-32 of each state that must be equal on every rank."""
        own, shared = {}, {}
        for name, state in sharded.states.items():
            for kind, tensors in (state.tensors() if state.tensors else {}).items():
                if not kind.isidentifier():
                    raise CheckpointError(
                        f"plugin {name!r} keeps tensors of the kind {kind!r}; use a Python identifier"
                    )
                if strangers := sorted(set(tensors) - set(self.own)):
                    raise CheckpointError(
                        f"plugin {name!r} keeps {kind!r} of {', '.join(strangers)}, which are no parameters here"
                    )
                self.layers[f"{PLUGIN}{name}.{kind}/"] = tensors
            shared[name] = to_json(state.shared() if state.shared else None, f"the state of plugin {name!r}")
            own[name] = to_json(state.own() if state.own else None, f"the state of plugin {name!r}")
        for name in sharded.differing:
            if name not in sharded.states or sharded.states[name].own is None:
                raise CheckpointError(
                    f"plugin {name!r} declares replicas_differ and keeps nothing of each rank, so a resumed run would "
                    "go on from one replica; return from PluginState.own what differs between ranks"
                )
        if sharded.states:
            self.of_rank["plugin_states"], self.of_all["plugin_states"] = own, shared
        return {name: zlib.crc32(json.dumps(value, sort_keys=True).encode()) for name, value in shared.items()}

    @property
    def weights(self) -> frozenset[str]:
        """The names, in the checkpoint, of what must be finite: all tensors of the model but its buffers."""
        return frozenset(MODEL + name for name, tensor in self.own.items() if isinstance(tensor, torch.nn.Parameter))

    @property
    def buffers(self) -> frozenset[str]:
        """The names, in the checkpoint, of buffers; those of ranks with different batches may differ."""
        return frozenset(
            MODEL + name for name, tensor in self.own.items() if not isinstance(tensor, torch.nn.Parameter)
        )

    def canonical(self, sharded: ShardedModel, prefixes: Sequence[str]) -> dict[str, Tensor]:
        """Return the canonical state; every rank exports all *prefixes*, as a plugin may run a collective for each."""
        state = {MODEL + name: tensor for name, tensor in exported(sharded, self.own).items()}
        for prefix in prefixes:
            tensors = exported(sharded, self.layers.get(prefix, {}))
            state |= {prefix + name: tensor for name, tensor in tensors.items()}
        return state


def _refuse_unequal_states(digests: Sequence[Mapping[str, int]]) -> None:
    """Raise CheckpointError, on every rank alike, for a plugin whose ``shared`` state differs between ranks."""
    for name in sorted({name for digest in digests for name in digest}):
        values = [digest.get(name) for digest in digests]
        usual = Counter(values).most_common(1)[0][0]
        odd = [str(rank) for rank, value in enumerate(values) if value != usual]
        if odd:
            raise CheckpointError(
                f"plugin {name!r} calls its state equal on every rank, but that of rank {', '.join(odd)} differs; "
                "return it from PluginState.own, or mend what makes it differ"
            )


def _joined(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Merge the metadata of all ranks: a list of what differs per rank, and once what belongs to parameters."""
    of_rank = ("dp_rank", "generators", "data", "plugin_states")
    joined: dict[str, Any] = {"ranks": [{name: a[name] for name in of_rank if name in a} for a in answers]}
    if "counts" in answers[0]:
        joined["counts"] = by_value([_turned(answer["counts"]) for answer in answers])
        joined["options"] = by_value([answer["options"] for answer in answers])
    return joined


def _turned(counts: Mapping[str, Any]) -> list[Any]:
    return [[value, [name]] for name, value in counts.items()]


def _about(sharded: ShardedModel, optimizer: Any, extra: Any, schedulers: Sequence[Any]) -> dict[str, Any]:
    """Return what is equal on every rank: versions, model class, optimizer, topology, plugins, schedulers and extra."""
    return {
        "versions": {
            "nemo_dist": importlib.metadata.version("nemo-dist"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "model": sharded.kind,
        "optimizer": None if optimizer is None else type(optimizer).__name__,
        "topology": sharded.topology,
        "plugins": {name: _version(package) for name, package in sharded.plugins.items()},
        "schedulers": [to_json(scheduler_state(scheduler), "the state of a scheduler") for scheduler in schedulers],
        "extra": to_json(extra, "extra"),
    }


def _step(extra: Any) -> int | None:
    found = extra.get("step") if isinstance(extra, Mapping) else None
    return found if type(found) is int else None


@lru_cache
def _version(package: str) -> str | None:
    """Return the version of the distribution that contains *package*; cached, as it searches all that is installed."""
    owners = importlib.metadata.packages_distributions().get(package, [])
    return importlib.metadata.version(owners[0]) if owners else None


@attrs.frozen(kw_only=True)
class _Work:
    """The part of a save that can run in the background: it runs no torch collective, ranks meet through the store.

    ``writers``: which rank writes each chunk. ``mine``: the chunks that this rank writes, by their names in the file.
    ``about``: what the manifest contains besides files and tensors. ``checked``: the names in the file of the chunks
    that should be finite.
    """

    ranks: RankGroup
    model: Any
    path: str | os.PathLike[str]
    writers: Mapping[str, Mapping[Chunk, int]]
    entries: Mapping[str, Entry]
    mine: Mapping[str, Tensor]
    about: Mapping[str, Any]
    checked: frozenset[str]

    @classmethod
    def plan(
        cls,
        ranks: RankGroup,
        model: Any,
        path: str | os.PathLike[str],
        state: Mapping[str, Tensor],
        entries: Mapping[str, Entry],
        writers: Mapping[str, Mapping[Chunk, int]],
        about: Mapping[str, Any],
        checked: Collection[str],
    ) -> _Work:
        mine, finite = {}, set()
        for name, tensor in state.items():
            for chunk, values in chunks(tensor):
                if writers[name][chunk] == ranks.rank:
                    mine[key(name, chunk)] = values
                    finite |= {key(name, chunk)} if name in checked and values.is_floating_point() else set()
        return cls(
            ranks=ranks,
            model=model,
            path=path,
            writers=writers,
            entries=entries,
            mine=mine,
            about=about,
            checked=frozenset(finite),
        )

    def copied(self) -> _Work:
        """Return this work with copies of its tensors in host memory, which training does not change."""
        return attrs.evolve(self, mine=to_host(self.mine), ranks=self.ranks.in_background())

    def run(self, prepare: Callable[[], None], committed: Callable[[], None]) -> None:
        """Write this rank's file; the first rank then writes the manifest and renames the folder into place."""
        write_folder(
            self.ranks,
            self.path,
            "the checkpoint",
            write=self._write_file,
            finish=self._write_manifest,
            stale=manifest.is_entry,
            refuse=manifest.refuse_others,
            prepare=prepare,
            committed=committed,
        )

    def _write_file(self, folder: Path) -> dict[str, Any]:
        name = f"rank-{self.ranks.rank:05d}.safetensors"
        layouts = {piece: (tuple(tensor.shape), tensor.dtype) for piece, tensor in self.mine.items()}
        with SafetensorsFile(folder / name, layouts) as file:
            for piece in file.slots:
                file.write(piece, self.mine[piece])
        odd = [piece for piece in self.checked if not _is_finite(self.mine[piece])]
        return {"name": name, "bytes": file.nbytes, "crc32": file.checksum, "not_finite": sorted(odd)[:_FEW]}

    def _write_manifest(self, folder: Path, files: Sequence[Mapping[str, Any]]) -> None:
        if odd := [piece for file in files for piece in file["not_finite"]]:
            warnings.warn(
                f"the checkpoint {self.path} has weights that are not finite: {', '.join(odd[:_FEW])}", stacklevel=2
            )
        write_companions(folder / manifest.IDENTITY, self.model)
        manifest.write(folder, files, {name: self._stored(name) for name in sorted(self.entries)}, self.about)

    def _stored(self, name: str) -> Stored:
        entry = self.entries[name]
        return Stored(
            entry.shape, entry.dtype, [StoredChunk(chunk, rank) for chunk, rank in self.writers[name].items()]
        )


def _is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite; reads *tensor* once and makes no copy of it."""
    if not tensor.numel():
        return True
    wide = tensor.float() if tensor.itemsize == 1 else tensor  # torch computes nothing in float8
    return bool(torch.isfinite(torch.linalg.vector_norm(wide, float("inf"))))


def share_out(entries: Mapping[str, Entry], count: int, even: bool = True) -> dict[str, dict[Chunk, int]]:
    """Return which rank writes each chunk: of its holders, the one with the fewest bytes to write so far.

    Without *even* it is the first of its holders, so that all chunks are of one replica.
    """
    load = [0] * count
    writers: dict[str, dict[Chunk, int]] = {}
    for name, entry in entries.items():
        writers[name] = {}
        for chunk, holders in entry.holders.items():
            writer = min(holders, key=lambda rank: (load[rank] if even else 0, rank))
            load[writer] += chunk.numel * entry.dtype.itemsize
            writers[name][chunk] = writer
    return writers
