"""Save a run: every rank writes its share of the canonical state, and the complete folder is renamed into place."""

from __future__ import annotations

import importlib.metadata
import json
import os
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from functools import lru_cache
from pathlib import Path
from typing import Any

import attrs
import torch
import transformers
from torch import Tensor

from nemo_dist.checkpoint import async_save, manifest, rng_state
from nemo_dist.checkpoint.atomic_dir import folder_at, write_folder
from nemo_dist.checkpoint.changed_optimizer import hides_state, makers, refuse_hidden_state
from nemo_dist.checkpoint.chunks import pieces_of
from nemo_dist.checkpoint.equal_copies import Copies
from nemo_dist.checkpoint.hf_side_files import write_companions
from nemo_dist.checkpoint.hf_weight_conversion import refuse_unplain
from nemo_dist.checkpoint.host_copy import settle, to_host
from nemo_dist.checkpoint.json_state import to_json
from nemo_dist.checkpoint.optimizer_state import by_value, counts, group_options, moments, named, options_of_names
from nemo_dist.checkpoint.safetensors_writer import SafetensorsFile
from nemo_dist.checkpoint.save_plan import SavePlan
from nemo_dist.checkpoint.scheduler_state import scheduler_state
from nemo_dist.checkpoint.sharded_model import ShardedModel
from nemo_dist.checkpoint.state_dict import copies, exported, own_state
from nemo_dist.checkpoint.stored_tensor import Stored
from nemo_dist.errors import CheckpointError
from nemo_dist.mesh.rank_group import RankGroup, digest_of
from nemo_dist.mesh.store_consensus import brief, refuse_differences, refuse_unequal

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
    Each rank collects its state and plans alone who writes what, from a description that all ranks of one stage have
    in common; then each writes its share.
    """
    async_save.finish()
    found = collect(sharded, path, optimizer, data=data, extra=extra, schedulers=schedulers, step=step)
    work, copies_here = plan_save(
        sharded, path, found, lambda: found.canonical(sharded), check_finite=check_finite, asynchronous=asynchronous
    )
    copies_here.compare(sharded.ranks, makers(optimizer))
    under_way = async_save.begin(lambda: work.run(prepare, committed))
    if not asynchronous:
        under_way.wait()
    return under_way


def collect(
    sharded: ShardedModel,
    path: str | os.PathLike[str],
    optimizer: Any,
    *,
    data: Any = None,
    extra: Any = None,
    schedulers: Sequence[Any] = (),
    step: int | None = None,
) -> Collected:
    """Return the state of the run on this rank, as ``save`` gets it; collective.

    Raises RankError for arguments that differ, CheckpointError for what cannot be saved.
    """
    found = Collected()
    found.common = sharded.ranks.decide(
        "collecting the state of the run",
        lambda: found.take(sharded, path, optimizer, data, extra, schedulers, step),
        _reconciled,
    )
    if found.common["hidden"]:
        refuse_hidden_state(makers(optimizer))
    if found.common["unequal"]:
        raise CheckpointError(found.common["unequal"])
    return found


def plan_save(
    sharded: ShardedModel,
    path: str | os.PathLike[str],
    found: Collected,
    canonical: Callable[[], Mapping[str, Tensor]],
    *,
    check_finite: bool = True,
    asynchronous: bool = False,
) -> tuple[Work, Copies]:
    """Return what this rank writes of the state that *canonical* returns, and its part of what several ranks have.

    Collective: ranks compare what they hold, and each then plans alone.
    """
    ranks, planner = sharded.ranks, sharded.planner
    state: dict[str, Tensor] = {}

    def describe() -> str:
        state.update(canonical())
        return f"{planner.describe(state, ranks)}\n{found.of_parameters}"

    said = [(of, text.partition("\n")) for of, text in ranks.distinct("collecting what to save", describe)]
    parameters = [json.loads(text) for _, (_, _, text) in said]
    if len(said) > 1:
        options = [(of, options_of_names(own["options"])) for (of, _), own in zip(said, parameters, strict=True) if own]
        refuse_unequal("the optimizer", options)
    with ranks.agreed("planning the save"):
        plan = planner.plan([(of, held) for of, (held, _, _) in said], ranks.rank, even=not sharded.differing)
        copies_here = Copies.of(plan, state, but=found.buffers)
        work = Work.of(sharded, path, state, plan, found.about(parameters), found, check_finite)
        if asynchronous:
            work = work.copied()
        settle(work.mine)  # the thread has a stream of its own
    return work, copies_here


@attrs.define
class Collected:
    """The state of the run on this rank.

    ``own``: parameters and persistent buffers by name. ``layers``: tensors that are laid out like parameters (an
    optimizer's moments, a plugin's tensors), by the prefix of their names in the checkpoint and parameter name.
    The others are JSON: what is different on every rank, what belongs to parameters that a rank has, as a text, and
    what is equal on all. ``common`` is what ``_reconciled`` returns. ``weights`` are the names, in the checkpoint, of
    what must be finite; ``buffers`` those of the rest of the model, which may differ on ranks with different batches.
    """

    own: Mapping[str, Tensor] = attrs.field(factory=dict)
    layers: dict[str, Mapping[str, Tensor]] = attrs.field(factory=dict)
    tensors_of_rank: dict[str, Tensor] = attrs.field(factory=dict)  # those in of_rank, by their names there
    of_rank: dict[str, Any] = attrs.field(factory=dict)
    of_parameters: str = "{}"
    dp_rank: int = 0
    of_all: dict[str, Any] = attrs.field(factory=dict)
    common: Mapping[str, Any] = attrs.field(factory=dict)
    weights: Set[str] = frozenset()
    buffers: Set[str] = frozenset()

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

        That is ``prefixes``, digests of ``data`` and of what plugins call ``shared``, ``same``, the arguments that must
        not differ, and ``hidden``, whether the optimizer shows no state though it should have some.
        """
        refuse_unplain(sharded.model)
        self.own, self.dp_rank = own_state(sharded), sharded.batch
        self.weights = {MODEL + name for name, tensor in self.own.items() if isinstance(tensor, torch.nn.Parameter)}
        self.buffers = {MODEL + name for name in self.own} - self.weights
        self.of_rank = {
            "generators": to_json(rng_state.capture(), "the generators"),
            "data": None if data is None else to_json(data.state_dict(), "the state of data"),
        }
        self.of_all = _about(sharded, optimizer, extra, schedulers) | {"step": _step(extra) if step is None else step}
        if optimizer is not None:
            self._take_optimizer(sharded, optimizer)
        shared = self._take_plugins(sharded)
        same = {name: brief(self.of_all[name]) for name in ("step", "optimizer", "schedulers", "extra")}
        folder_at(path)  # refuses what names no folder; links may lead elsewhere on another machine
        same |= {"path": str(Path(path).expanduser().absolute()), "data": "given" if data is not None else "None"}
        digest = None if data is None else digest_of(json.dumps(self.of_rank["data"], sort_keys=True))
        hidden = optimizer is not None and hides_state(optimizer)
        return {"prefixes": list(self.layers), "shared": shared, "same": same, "data": digest, "hidden": hidden}

    def _take_optimizer(self, sharded: ShardedModel, optimizer: Any) -> None:
        parameters = named(optimizer, self.own, copies(sharded, self.own))
        turned = by_value([_turned(counts(optimizer, parameters))])
        self.of_parameters = json.dumps({"counts": turned, "options": group_options(optimizer, parameters)})
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
            values = state.own() if state.own else None
            own[name] = to_json(values, f"the state of plugin {name!r}", apart=self.tensors_of_rank)
        for name in sharded.differing:
            if name not in sharded.states or sharded.states[name].own is None:
                raise CheckpointError(
                    f"plugin {name!r} declares replicas_differ and keeps nothing of each rank, so a resumed run would "
                    "go on from one replica; return from PluginState.own what differs between ranks"
                )
        if sharded.states:
            self.of_rank["plugin_states"], self.of_all["plugin_states"] = own, shared
        return {name: zlib.crc32(json.dumps(value, sort_keys=True).encode()) for name, value in shared.items()}

    def about(self, of_parameters: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return what the manifest contains besides files and tensors, with what all ranks have of parameters."""
        return {**self.of_all, **_joined(of_parameters), "data": self.common["data"]}

    def canonical(self, sharded: ShardedModel) -> dict[str, Tensor]:
        """Return the canonical state; every rank exports all prefixes, as a plugin may run a collective for each."""
        state = {MODEL + name: tensor for name, tensor in exported(sharded, self.own).items()}
        for prefix in self.common["prefixes"]:
            tensors = exported(sharded, self.layers.get(prefix, {}))
            state |= {prefix + name: tensor for name, tensor in tensors.items()}
        return state


def _reconciled(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what all ranks must know of all: ``prefixes``, how ``data`` is, what is ``unequal`` wrongly or ``hidden``.

    Raises RankError for arguments that differ.
    """
    refuse_differences("what to save", [summary["same"] for summary in summaries])
    data = [summary["data"] for summary in summaries]
    equal = all(digest == data[0] for digest in data)
    return {
        "prefixes": sorted({prefix for summary in summaries for prefix in summary["prefixes"]}),
        "data": None if data[0] is None else "equal" if equal else "each",
        "unequal": _unequal_states([summary["shared"] for summary in summaries]),
        "hidden": all(summary["hidden"] for summary in summaries),
    }


def _unequal_states(digests: Sequence[Mapping[str, int]]) -> str:
    """Return what to say of a plugin whose ``shared`` state differs between ranks; "" where none does."""
    for name in sorted({name for digest in digests for name in digest}):
        values = [digest.get(name) for digest in digests]
        usual = Counter(values).most_common(1)[0][0]
        odd = [str(rank) for rank, value in enumerate(values) if value != usual]
        if odd:
            return (
                f"plugin {name!r} calls its state equal on every rank, but that of rank {', '.join(odd)} differs; "
                "return it from PluginState.own, or mend what makes it differ"
            )
    return ""


def _joined(several: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge what belongs to parameters: ``counts`` and ``options``, each value once with all names that have it."""
    merged = {what: by_value([one[what] for one in several]) for what in several[0]}
    _refuse_several(merged.get("counts", ()))
    return merged


def _refuse_several(counts: Sequence[tuple[Mapping[str, Any], Sequence[str]]]) -> None:
    """Raise CheckpointError where ranks have different values of one parameter, as one of them would be loaded."""
    values: dict[str, Mapping[str, Any]] = {}
    for value, names in counts:
        for name in names:
            first = values.setdefault(name, value)
            if odd := [kind for kind in first.keys() | value.keys() if first.get(kind) != value.get(kind)]:
                raise CheckpointError(
                    f"the optimizer keeps another {' and '.join(sorted(odd))} of {name} on some ranks, and a "
                    "checkpoint has one for all; keep what belongs to a shard in a DTensor like the parameter"
                )


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
class Work:
    """The part of a save that can run in the background: it runs no torch collective, ranks meet through the store.

    ``tensors``: where the chunks of all tensors will be. ``mine``: the chunks that this rank writes, by their names in
    the file. ``about``: what the manifest contains besides files and tensors, ``of_rank``: what is of this rank alone.
    ``checked``: the names in the file of the chunks that should be finite.
    """

    ranks: RankGroup
    model: Any
    path: Path
    tensors: Mapping[str, Stored]
    mine: Mapping[str, Tensor]
    about: Mapping[str, Any]
    of_rank: bytes
    dp_rank: int
    checked: frozenset[str]

    @classmethod
    def of(
        cls,
        sharded: ShardedModel,
        path: str | os.PathLike[str],
        state: Mapping[str, Tensor],
        plan: SavePlan,
        about: Mapping[str, Any],
        found: Collected,
        check_finite: bool,
    ) -> Work:
        """Return the work for *plan* of *state*; ``about`` as above, the rest from *found*."""
        mine = {**pieces_of(state, plan), **found.tensors_of_rank}
        checked = found.weights if check_finite else ()
        return cls(
            ranks=sharded.ranks,
            model=sharded.model,
            path=folder_at(path),  # now, as a script may go to another folder while a thread writes
            tensors=plan.tensors,
            mine=mine,
            about=about,
            of_rank=json.dumps(found.of_rank).encode(),
            dp_rank=found.dp_rank,
            checked=frozenset(
                piece.label for piece in plan.pieces if piece.name in checked and mine[piece.label].is_floating_point()
            ),
        )

    def copied(self) -> Work:
        """Return this work with copies of its tensors in host memory, which training does not change."""
        return attrs.evolve(self, mine=to_host(self.mine), ranks=self.ranks.in_background())

    def run(self, prepare: Callable[[], None], committed: Callable[[], None]) -> None:
        """Write this rank's file; the first rank then writes the manifest and renames the folder into place."""
        write_folder(
            self.ranks,
            self.path,
            "the checkpoint",
            write=self._write_file,
            finish=self.write_manifest,
            stale=manifest.is_entry,
            refuse=manifest.refuse_others,
            prepare=prepare,
            committed=committed,
        )

    def _write_file(self, folder: Path) -> dict[str, Any]:
        name = manifest.file_name(self.ranks.rank)
        written = {**self.mine, manifest.OF_RANK: torch.frombuffer(bytearray(self.of_rank), dtype=torch.uint8)}
        layouts = {piece: (tuple(tensor.shape), tensor.dtype) for piece, tensor in written.items()}
        with SafetensorsFile(folder / name, layouts) as file:
            for piece in file.slots:
                file.write(piece, written[piece])
        odd = [piece for piece in self.checked if not _is_finite(self.mine[piece])]
        few = {"not_finite": sorted(odd)[:_FEW]} if odd else {}
        return {"name": name, "bytes": file.nbytes, "crc32": file.checksum, "dp_rank": self.dp_rank, **few}

    def write_manifest(self, folder: Path, files: Sequence[Mapping[str, Any]]) -> None:
        """Write the manifest of *files*, the lines that all ranks return of theirs."""
        if odd := [piece for file in files for piece in file.get("not_finite", ())]:
            warnings.warn(
                f"the checkpoint {self.path} has weights that are not finite: {', '.join(odd[:_FEW])}", stacklevel=2
            )
        write_companions(folder / manifest.IDENTITY, self.model)
        manifest.write(folder, files, self.tensors, self.about)


def _is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite; reads *tensor* once and makes no copy of it."""
    if not tensor.numel():
        return True
    wide = tensor.float() if tensor.itemsize == 1 else tensor  # torch computes nothing in float8
    return bool(torch.isfinite(torch.linalg.vector_norm(wide, float("inf"))))
