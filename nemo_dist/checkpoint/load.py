"""Load a run: verify the whole checkpoint first, then let every rank read the chunks that it holds."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import ExitStack, suppress
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from nemo_dist.checkpoint import async_save, rng_state
from nemo_dist.checkpoint.atomic_dir import Staging
from nemo_dist.checkpoint.chunks import chunks
from nemo_dist.checkpoint.json_state import from_json
from nemo_dist.checkpoint.layout import Chunk
from nemo_dist.checkpoint.manifest import Manifest, open_file
from nemo_dist.checkpoint.optimizer_state import copy_state, count_of, named, options_of_groups, place
from nemo_dist.checkpoint.safetensors_writer import DTYPE_OF
from nemo_dist.checkpoint.save import MODEL, OPTIMIZER, PLUGIN
from nemo_dist.checkpoint.scheduler_state import fitted, restore_scheduler
from nemo_dist.checkpoint.sharded_model import ShardedModel
from nemo_dist.checkpoint.state_dict import copies, exported, imported, own_state
from nemo_dist.errors import CheckpointError
from nemo_dist.mesh.process_group import made_on_cpu
from nemo_dist.mesh.rank_group import RankGroup
from nemo_dist.plugin.hookspecs import SavedState


def load(
    sharded: ShardedModel,
    path: str | os.PathLike[str],
    optimizer: Any = None,
    *,
    schedulers: Sequence[Any] = (),
    data: Any = None,
) -> Any:
    """Load the run; see :meth:`nemo_dist.Runtime.load`."""
    manifest = intact(sharded.ranks, path)
    return load_from(sharded, manifest, optimizer, schedulers=schedulers, data=data)


def intact(ranks: RankGroup, path: str | os.PathLike[str]) -> Manifest:
    """Verify every byte of the checkpoint at *path* and return its manifest; collective over *ranks*.

    Waits for the current save first. Each file is read whole by one of the ranks. Raises CheckpointError with the
    reason on a rank that found it, and RankError that quotes it on the others.
    """
    async_save.finish()
    with ranks.agreed(f"finding the checkpoint at {path}"):
        place = Staging.beside(path)
        if ranks.first:
            place.recover()
    with ranks.agreed(f"reading the manifest of {path}"):
        manifest = Manifest.read(place.final)
    with ranks.agreed(f"verifying {path}"):
        if ranks.first:
            manifest.verify_companions()
        for index in range(ranks.rank, len(manifest.files), ranks.size):
            manifest.verify(index)
    return manifest


def load_from(
    sharded: ShardedModel,
    manifest: Manifest,
    optimizer: Any = None,
    *,
    schedulers: Sequence[Any] = (),
    data: Any = None,
) -> Any:
    """Load the run from a verified checkpoint; all ranks first agree that it fits, and nothing is changed before that.

    Arguments and errors as for :meth:`nemo_dist.Runtime.load`.
    """
    run = _Run(sharded=sharded, manifest=manifest, optimizer=optimizer, schedulers=schedulers)
    with made_on_cpu():  # what safetensors reads
        _load(run, data)
    return run.extra


def _load(run: _Run, data: Any) -> None:
    ranks, manifest, path = run.sharded.ranks, run.manifest, run.manifest.folder
    names = ranks.distinct(f"comparing {path} with the model", lambda: json.dumps(run.compare(data)))
    _check_complete(manifest, {name for _, text in names for name in json.loads(text)})
    if data is not None:
        _hand_to_data(ranks, manifest, data, run.data_state)
    with Reader(manifest) as reader:
        with ranks.agreed(f"opening {path}"):
            reader.open(run.files)
        with ranks.agreed(f"loading {path}"), torch.no_grad():
            run.fill(reader)


@attrs.define(kw_only=True)
class _Run:
    """The run to load into: what of it ``compare`` found, which changes nothing, and ``fill`` then changes."""

    sharded: ShardedModel
    manifest: Manifest
    optimizer: Any
    schedulers: Sequence[Any]
    own: Mapping[str, Tensor] = attrs.field(factory=dict)
    twice: Sequence[tuple[Tensor, Tensor]] = ()
    parameters: Mapping[str, nn.Parameter] = attrs.field(factory=dict)
    options: Sequence[Mapping[str, Any]] = ()
    counts: Callable[[str, bool], Any] = attrs.field(factory=lambda: count_of(()))
    fits: Sequence[Any] = ()
    plugin_states: Mapping[str, SavedState] = attrs.field(factory=dict)
    generators: Any = None
    data_state: Any = None
    extra: Any = None
    files: Set[int] = frozenset()

    def compare(self, data: Any) -> list[str]:
        """Compare all of the run with the checkpoint; return the names of the tensors of the model that it reads."""
        sharded, manifest = self.sharded, self.manifest
        self.own = own_state(sharded)
        canonical = exported(sharded, self.own)
        names = _check_model(sharded, manifest, canonical)
        self.twice = copies(sharded, self.own)
        self.parameters = _check_optimizer(manifest, self.optimizer, self.own, self.twice)
        with manifest.readable():
            if self.parameters:
                self.options = options_of_groups(self.optimizer, self.parameters, manifest.about["options"])
            elif self.optimizer is not None:
                self.options = [{} for _ in self.optimizer.param_groups]
            self.counts = count_of(manifest.about["counts"] if self.parameters else ())
            _check_layers(manifest)
            _check_rest(manifest, self.schedulers, data)
            states = [from_json(state) for state in manifest.about["schedulers"]]
            self.generators = _generators(sharded, manifest)
            self.data_state = _data_state(manifest, data, sharded.batch, sharded.batches)
            self.extra = from_json(manifest.about["extra"])
            self.fits = [fitted(scheduler, state) for scheduler, state in zip(self.schedulers, states, strict=True)]
        self.plugin_states = _plugin_states(sharded, manifest)
        self.files = _files_of(manifest, canonical)
        return names

    def fill(self, reader: Reader) -> None:
        """Read what this rank holds, and put it into the run."""
        sharded, optimizer = self.sharded, self.optimizer
        with imported(sharded, self.own) as canonical:
            reader.fill(MODEL, canonical)
        for tensor, copy in self.twice:
            copy.copy_(tensor)
        if optimizer is not None:
            _load_optimizer(sharded, reader, optimizer, self.parameters, self.counts)
            copy_state(optimizer, self.twice)
            for group, values in zip(optimizer.param_groups, self.options, strict=True):
                group.update(values)
        parameters = {name: tensor for name, tensor in self.own.items() if isinstance(tensor, nn.Parameter)}
        for name, saved in self.plugin_states.items():
            _load_plugin(sharded, reader, name, saved, parameters)
        for scheduler, state in zip(self.schedulers, self.fits, strict=True):
            restore_scheduler(scheduler, state)
        if self.generators is not None:
            rng_state.restore(self.generators)


@attrs.define
class Reader:
    """Reads slices of the tensors of a checkpoint, and opens its files on first use."""

    manifest: Manifest
    _files: dict[int, Any] = attrs.field(factory=dict)
    _stack: ExitStack = attrs.field(factory=ExitStack)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()

    def fill(self, prefix: str, canonical: Mapping[str, Tensor]) -> None:
        """Fill this rank's chunks of every tensor in *canonical* from the stored tensors called *prefix* + name."""
        for name, tensor in canonical.items():
            for chunk, values in chunks(tensor):
                self.read(prefix + name, chunk, values)

    def read(self, name: str, wanted: Chunk, into: Tensor) -> None:
        """Read the chunk *wanted* of the stored tensor *name* into the view *into*, which has its sizes."""
        for slice_ in self.manifest.slices(name, wanted):
            file = self._open(slice_.file)
            try:
                if slice_.spans is None:
                    found = file.get_tensor(slice_.label)
                else:
                    found = file.get_slice(slice_.label)[slice_.spans]
            except ValueError as error:  # torch puts it in the place of what a signal handler raises meanwhile
                raise CheckpointError(
                    f"reading {name} from {self.manifest.folder} was interrupted, most likely by a signal; load it "
                    "again, into a model made anew where this process goes on"
                ) from error
            slice_.into.of(into).copy_(found)

    def open(self, files: Iterable[int]) -> None:
        """Open *files*, by index, so that they can be read although another process removes them meanwhile."""
        for index in files:
            self._open(index)

    def _open(self, index: int) -> Any:
        if index not in self._files:
            path = self.manifest.folder / self.manifest.files[index]["name"]
            self._files[index] = self._stack.enter_context(open_file(path))
        return self._files[index]


def _files_of(manifest: Manifest, canonical: Mapping[str, Tensor]) -> set[int]:
    """Return the indices of the files that have chunks of this rank's tensors, and of what is laid out like them."""
    wanted = {name: [chunk for chunk, _ in chunks(tensor)] for name, tensor in canonical.items()}
    return {
        slice_.file
        for stored in manifest.tensors
        for chunk in wanted.get(stored.partition("/")[2], ())
        for slice_ in manifest.slices(stored, chunk)
    }


def _check_model(sharded: ShardedModel, manifest: Manifest, canonical: Mapping[str, Tensor]) -> list[str]:
    """Return the names that this rank reads; raise CheckpointError where class, name, shape or dtype differ."""
    about, kind = manifest.about, sharded.kind
    if about["model"] != kind:
        raise CheckpointError(f"{manifest.folder} is of a {about['model']}, but the model is a {kind}")
    problems = []
    for name, tensor in canonical.items():
        stored = manifest.tensors.get(MODEL + name)
        if stored is None:
            problems.append(f"{name} is not in the checkpoint")
        elif (stored.shape, DTYPE_OF[stored.dtype]) != (tuple(tensor.shape), tensor.dtype):
            own_layout = f"{tensor.dtype} {tuple(tensor.shape)}"
            there = f"{DTYPE_OF[stored.dtype]} {stored.shape}"
            problems.append(f"{name} is {there} in the checkpoint, {own_layout} in the model")
    _raise(manifest, problems)
    return list(canonical)


def _check_complete(manifest: Manifest, known: Set[str]) -> None:
    """Raise CheckpointError for parameters of the checkpoint that are not *known*, the names that any rank has."""
    stored = {name.removeprefix(MODEL) for name in manifest.tensors if name.startswith(MODEL)}
    _raise(manifest, [f"{name} is not in the model" for name in sorted(stored - known)])


def _raise(manifest: Manifest, problems: Sequence[str], most: int = 10) -> None:
    if problems:
        more = f"\n- and {len(problems) - most} more" if len(problems) > most else ""
        lines = "\n".join(f"- {problem}" for problem in problems[:most])
        raise CheckpointError(f"{manifest.folder} does not fit the model:\n{lines}{more}")


def _check_optimizer(
    manifest: Manifest, optimizer: Any, own: Mapping[str, Tensor], copies: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, nn.Parameter]:
    if optimizer is None:
        return {}
    saved, kind = manifest.about["optimizer"], type(optimizer).__name__
    if saved != kind:
        what = "without an optimizer" if saved is None else f"with the optimizer {saved}"
        raise CheckpointError(f"{manifest.folder} was saved {what}, and the optimizer to load is {kind}")
    return named(optimizer, own, copies)


def _check_layers(manifest: Manifest) -> None:
    """Refuse moments, and tensors of plugins, that are not those of a parameter with the same shape."""
    problems = []
    for name, stored in manifest.tensors.items():
        parameter = manifest.tensors.get(MODEL + name.partition("/")[2])
        if not name.startswith(MODEL) and (parameter is None or parameter.shape != stored.shape):
            shape = "no parameter of that name" if parameter is None else f"its parameter has {parameter.shape}"
            problems.append(f"{name} has shape {stored.shape}, but {shape}")
    _raise(manifest, problems)


def _check_rest(manifest: Manifest, schedulers: Sequence[Any], data: Any) -> None:
    saved = len(manifest.about["schedulers"])
    if len(schedulers) != saved:
        raise CheckpointError(f"{manifest.folder} has {saved} schedulers, but {len(schedulers)} are to be loaded")
    if data is not None and manifest.data is None:
        raise CheckpointError(f"{manifest.folder} has no state of data; leave data out")


def _same_topology(sharded: ShardedModel, manifest: Manifest) -> bool:
    """Whether axes, strategy and number of ranks are those of the save, so that each rank holds the same shards."""
    listed = manifest.about["topology"]
    saved = {axis: size for axis, size in listed.items() if size != 1}
    own = sharded.topology
    if 1 in listed.values():  # version 0.1 listed six axes, whatever their sizes, and no others
        own = {axis: size for axis, size in own.items() if axis in listed}
    return saved == own and len(manifest.dp_ranks) == sharded.ranks.size


def _generators(sharded: ShardedModel, manifest: Manifest) -> Any:
    """Return the saved states of the random generators for this rank, or None.

    With the same topology these are of the same rank; otherwise of the first one with the same data-parallel
    coordinate.
    """
    if _same_topology(sharded, manifest):
        mine = sharded.ranks.rank
    elif sharded.batch in manifest.dp_ranks:
        mine = manifest.dp_ranks.index(sharded.batch)
    else:
        return None
    generators = from_json(manifest.of_rank(mine)["generators"])
    rng_state.check(generators)
    return generators


def _plugin_states(sharded: ShardedModel, manifest: Manifest) -> dict[str, SavedState]:
    """Return the saved state, without tensors, of each plugin that both the run and the checkpoint have.

    Raises CheckpointError with the reason of every plugin that cannot load its state. Warns of a plugin that only the
    run or only the checkpoint has.
    """
    saved: Mapping[str, Any] = manifest.about.get("plugin_states", {})
    for name in saved.keys() ^ sharded.states.keys():
        here, there = ("the run", "the checkpoint") if name in sharded.states else ("the checkpoint", "the run")
        warnings.warn(f"{here} has state of plugin {name!r}, and {there} has not: it is left out", stacklevel=3)
    same, found, problems = _same_topology(sharded, manifest), {}, []
    names = [name for name in sharded.states if name in saved]
    with manifest.readable():
        of_rank = manifest.of_rank(sharded.ranks.rank, tensors=True)["plugin_states"] if same and names else {}
    for name in names:
        with manifest.readable():
            own = from_json(of_rank[name]) if same else None
            found[name] = SavedState(shared=from_json(saved[name]), own=own)
        state = sharded.states[name]
        if state.accepts is not None:
            problem = state.accepts(found[name])
        else:
            lost = state.own is not None and not same
            problem = "it keeps state of its own on every rank, and the topology is another one" if lost else None
        problems += [f"plugin {name!r}: {problem}"] if problem else []
    _raise(manifest, problems)
    return found


def _load_plugin(
    sharded: ShardedModel, reader: Reader, name: str, saved: SavedState, parameters: Mapping[str, nn.Parameter]
) -> None:
    """Read the tensors of the plugin *name*, laid out like *parameters*, and call its ``load`` with its saved state."""
    kinds = reader.manifest.kinds(f"{PLUGIN}{name}.")
    tensors = {kind: _read_like(sharded, reader, f"{PLUGIN}{name}.{kind}/", parameters) for kind in kinds}
    sharded.states[name].load(attrs.evolve(saved, tensors=tensors))


def _data_state(manifest: Manifest, data: Any, dp_rank: int, dp_size: int) -> Any:
    """Return the saved state of *data* for this data-parallel rank.

    With another data-parallel size than when it was saved, all ranks must have saved equal states; otherwise raises
    CheckpointError.
    """
    if data is None:
        return None
    batches = 1 + max(manifest.dp_ranks)
    if batches == dp_size:
        return from_json(manifest.of_rank(manifest.dp_ranks.index(dp_rank))["data"])
    if manifest.data == "equal":
        return from_json(manifest.of_rank(0)["data"])
    raise CheckpointError(
        f"{manifest.folder} has a different state of data for each of {batches} data-parallel ranks, and here are "
        f"{dp_size}; leave data out and set its position from what you saved as extra"
    )


def _hand_to_data(ranks: RankGroup, manifest: Manifest, data: Any, state: Any) -> None:
    """Load *state* into *data*, a user's object, which may not take it: then all ranks give it back what it had."""
    before = data.state_dict()
    try:
        with ranks.agreed(f"loading the state of data from {manifest.folder}"):
            try:
                data.load_state_dict(state)
            except Exception as error:
                raise CheckpointError(
                    f"{type(data).__name__} did not take the state that {manifest.folder} has of data: "
                    f"{type(error).__name__}: {error}; leave data out, or load it into what it was saved from"
                ) from error
    except Exception:
        with suppress(Exception):
            data.load_state_dict(before)
        raise


def _load_optimizer(
    sharded: ShardedModel,
    reader: Reader,
    optimizer: Any,
    parameters: Mapping[str, nn.Parameter],
    counts: Callable[[str, bool], Any],
) -> None:
    """Replace the state of *optimizer* by the moments of the checkpoint and the saved *counts* of steps."""
    optimizer.state.clear()
    for kind in reader.manifest.kinds(OPTIMIZER):
        for name, tensor in _read_like(sharded, reader, f"{OPTIMIZER}{kind}/", parameters).items():
            optimizer.state[parameters[name]][kind] = tensor
    group_of = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in parameters.items():
        for kind, value in counts(name, bool(optimizer.state.get(parameter))).items():
            optimizer.state[parameter][kind] = place(value, parameter, group_of[id(parameter)])


def _read_like(
    sharded: ShardedModel, reader: Reader, prefix: str, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Return the tensors stored under *prefix*, laid out like the parameters; parameters without one are left out."""
    tensors = reader.manifest.tensors
    stored = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    found = {
        name: torch.empty_like(parameter, dtype=DTYPE_OF[stored[name].dtype] if name in stored else None)
        for name, parameter in parameters.items()
    }
    for name in [name for name in exported(sharded, found) if name not in stored]:
        found.pop(name, None)
    with imported(sharded, found) as canonical:
        reader.fill(prefix, canonical)
    return found
