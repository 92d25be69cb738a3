"""Forge manifests and rank files with right checksums and nonsense of every kind, and load, resume, prune and export.

A manifest names the layouts of tensors, lists chunks where there is none, and has a line for each file; a rank file has
a header, and what is different on every rank as JSON.
"""

from __future__ import annotations

import json
import shutil
import sys
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from campaign.forks import call
from campaign.tally import Tally
from campaign.tiny_run import TinyRun, checksum
from nemo_dist import CheckpointError, RankError, RunFolder, export_checkpoint
from nemo_dist.checkpoint import manifest

_KINDS = ("tensor", "ndarray", "scalar", "bytes", "tuple", "set", "deque", "dict", "Counter", "OrderedDict", "x", None)
_CONTENTS = (None, "", "AAAA", "AAAAAAAAAAA=", "no base64", [], [[]], [[1, 2]], [[[], 1]], [[{"a": 1}, 1]], 3, {}, [1])
_DTYPES = ("float32", "int64", "<f8", "|O", "V9999999999", "S0", "load", "", None, 4, ["<f8"])
_SHAPES = ([], [1], [-1], [0, 10**12], [10**30], [2, 2], "x", None, {}, [1.5], [True])
_JUNK = (None, True, False, -1, 0, 1, 1.5, "", "x", "\0", "../x", "/etc/passwd", "é" * 300, [], [[]], {}, {"x": 1})
_HUGE = (2**31, 2**63, 2**64, 10**30, 10**400, -(10**30), 1e308, float("inf"), float("nan"))
_NAMES = ("../rank-00000.safetensors", "/etc/passwd", "rank-00000.safetensors/", "rank-00000.safetensors\n", "\0", "..")


def run(count: int, chance: Random, folder: Path) -> Iterator[Tally]:
    """Yield the counts for a load, and in smaller numbers for what else reads a manifest, on one rank and on two."""
    for name, use, sizes, share in (
        ("forged, load", load, None, count),
        ("forged, load, 2 ranks", load, {}, count // 10),
        ("forged, load, pp 2", load, {"pp_size": 2}, count // 10),
        ("forged, resume from a run folder", resume, None, count // 5),
        ("forged, the next save prunes", save, None, count // 5),
        ("forged, nemo-dist export", export, None, count // 5),
    ):
        place, world = folder / name.replace(" ", "-"), 1 if sizes is None else 2
        tallies = call(world, on_rank_forge, name, use, sizes, max(1, share), chance, place)
        yield max(tallies, key=lambda tally: len(tally.lost))


class _OlderTaken(Exception):
    """The checkpoint was left out, and the one before it taken."""


def load(run: TinyRun, folder: Path) -> None:
    """Load the checkpoint."""
    run.runtime.load(folder / "step-00000002", run.optimizer, **run.also)


def resume(run: TinyRun, folder: Path) -> None:
    """Resume from the newest checkpoint that is right: when it is the one before, that is a refusal."""
    found = RunFolder(folder).resume(run.runtime, run.optimizer, **run.also)
    if found is not None and found[0] == 1:
        raise _OlderTaken


def save(run: TinyRun, folder: Path) -> None:
    """Save the next step, which looks at the one before to prune, then remove it."""
    RunFolder(folder, keep_last=2).save(run.runtime, run.optimizer, step=3, **run.also)
    RunFolder(folder).latest()
    shutil.rmtree(folder / "step-00000003")


def export(run: TinyRun, folder: Path) -> None:
    """Export the checkpoint without the ranks that wrote it."""
    try:
        export_checkpoint(folder / "step-00000002", folder.parent / "exported")
    finally:
        shutil.rmtree(folder.parent / "exported", ignore_errors=True)


def on_rank_forge(
    tell: Callable[..., None],
    name: str,
    use: Callable[[TinyRun, Path], None],
    sizes: Mapping[str, int] | None,
    count: int,
    chance: Random,
    folder: Path,
) -> Tally:
    """Forge a checkpoint, *use* it, and compare the run with what it was."""
    warnings.simplefilter("ignore")
    tally, run, place = Tally(name), TinyRun(sizes), folder / "run" / "step-00000002"
    run.train()
    run.save(RunFolder(folder / "run"))
    older = _layers(run)
    run.train()
    run.save(RunFolder(folder / "run"))
    newer = _layers(run)
    whole = {path.name: path.read_bytes() for path in place.iterdir() if path.is_file()}
    content = {name: value for name, value in json.loads(whole[manifest.NAME]).items() if name != "checksum"}
    for _ in range(count):
        kind, forged = forge(content, whole, chance)
        _write(place, whole | forged)
        before = checksum(run.tensors())
        try:
            use(run, folder / "run")
            done = "loaded"
        except _OlderTaken:
            done = "left out"
        except (CheckpointError, RankError):
            done = "refused"
        except BaseException as error:
            done = f"{type(error).__name__}: {error}\n{''.join(traceback.format_tb(error.__traceback__)[-2:])}"
        torch.distributed.barrier()
        right = {"loaded": _layers(run) == newer, "left out": _layers(run) == older}
        if right.get(done, checksum(run.tensors()) == before and done == "refused"):
            tally.survive() if done == "loaded" else tally.refuse()
        else:
            tally.lose(f"{kind}: {done}" + ("" if ":" in done else ", but the run has changed"))
        if checksum(run.tensors()) != before:
            _write(place, whole)
            load(run, folder / "run")
    return tally


def _write(place: Path, files: Mapping[str, bytes]) -> None:
    """Have one rank write *files* to the folder *place*, when all have read what was there."""
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        for name, content in files.items():
            (place / name).write_bytes(content)
    torch.distributed.barrier()


def _layers(run: TinyRun) -> int:
    """Return a checksum of weights and moments: of all that a forged manifest that fits must not change."""
    return checksum({name: value for name, value in run.tensors().items() if not name.startswith(("step/", "gen"))})


def forge(content: Any, whole: Mapping[str, bytes], chance: Random) -> tuple[str, Mapping[str, bytes]]:
    """Return what was done to a copy of the manifest *content* and of *whole*, all files, and the changed files."""
    forged, files, said = json.loads(json.dumps(content)), {}, []
    if chance.random() < 0.3:
        file = chance.choice(forged["files"])
        change = chance.choice(FILE_CHANGES)
        files[file["name"]] = found = change(whole[file["name"]], chance)
        file |= {"bytes": len(found), "crc32": zlib.crc32(found)}
        said.append(change.__name__)
    for _ in range(0 if said and chance.random() < 0.8 else chance.choice((1, 1, 1, 2, 5))):
        change = chance.choice(CHANGES)
        try:
            change(forged, chance)
            said.append(change.__name__)
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
            continue  # an earlier change has left nothing to do this to, or a value too deep to copy
    with _deep():
        return " and ".join(said), {manifest.NAME: _sealed(forged), **files}


@contextmanager
def _deep() -> Iterator[None]:
    """Let what is nested deeply be written."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


def _sealed(content: Any) -> bytes:
    """Return *content* with its checksum, of the format that it says it has."""
    if content.get("format") != 1:
        return manifest.sealed(content)
    return json.dumps({**content, "checksum": manifest._checksum_1(content)}).encode()


def _somewhere(content: Any, chance: Random) -> tuple[Any, Any]:
    """Return a container in *content*, and a key or index of it; what is rare is as likely as what is common."""
    container, key = content, chance.choice(list(content))
    while isinstance(container[key], dict | list) and container[key] and chance.random() < 0.85:
        container = container[key]
        key = chance.choice(list(container) if isinstance(container, dict) else range(len(container)))
    return container, key


def junk(content: Any, chance: Random) -> None:
    """Put junk in the place of a value."""
    container, key = _somewhere(content, chance)
    container[key] = chance.choice(_JUNK)


def huge(content: Any, chance: Random) -> None:
    """Put a huge number in the place of a value."""
    container, key = _somewhere(content, chance)
    container[key] = chance.choice(_HUGE)


def missing(content: Any, chance: Random) -> None:
    """Leave something out."""
    container, key = _somewhere(content, chance)
    del container[key]


def twice(content: Any, chance: Random) -> None:
    """List something twice, or under another name too."""
    container, key = _somewhere(content, chance)
    if isinstance(container, list):
        container.append(container[key])
    else:
        container[f"{key}x"] = container[key]


def swapped(content: Any, chance: Random) -> None:
    """Swap two values."""
    (one, key), (other, name) = _somewhere(content, chance), _somewhere(content, chance)
    one[key], other[name] = json.loads(json.dumps([other[name], one[key]]))


def encoded(content: Any, chance: Random) -> None:
    """Put an encoded value of no sense in the place of a value."""
    container, key = _somewhere(content, chance)
    container[key] = {
        "nemo_dist": chance.choice(_KINDS),
        "value": chance.choice(_CONTENTS),
        "dtype": chance.choice(_DTYPES),
        "shape": chance.choice(_SHAPES),
    }


def deep(content: Any, chance: Random) -> None:
    """Nest a value deeply."""
    container, key = _somewhere(content, chance)
    levels, shell = chance.choice((50, 200, 400, 900, 3000)), chance.choice(("list", "dict", "tuple"))
    for _ in range(levels):
        inner = container[key]
        shells: dict[str, Any] = {
            "list": [inner],
            "dict": {"x": inner},
            "tuple": {"nemo_dist": "tuple", "value": [inner]},
        }
        container[key] = shells[shell]


def chunks(content: Any, chance: Random) -> None:
    """Move, stretch, repeat or drop chunks of a tensor, listed in place of its layout."""
    shape, dtype, *_ = content["tensors"][name := chance.choice(list(content["tensors"]))]
    piece = [0, [0] * len(shape), list(shape)]
    pieces = [piece]
    content["tensors"][name] = [shape, dtype, pieces]
    which = chance.randrange(6)
    if which == 0:
        pieces.append(json.loads(json.dumps(piece)))
    elif which == 1:
        pieces.remove(piece)
    elif which == 2:
        piece[0] = chance.choice((1, -1, 10**9, True))
    elif which == 3:
        piece[chance.choice((1, 2))][chance.randrange(len(shape))] += chance.choice((-1, 1, 2**63, -(2**40)))
    elif which == 4:
        half = piece[2][0] // 2
        pieces.append([piece[0], [piece[1][0] + half - 1, *piece[1][1:]], [half, *piece[2][1:]]])
        piece[2][0] = half
    else:
        shape.reverse()


def layouts(content: Any, chance: Random) -> None:
    """Change a layout: its ranks, an axis of its mesh, or a placement."""
    layout = chance.choice(content["layouts"])
    values = chance.choice((layout["ranks"], *layout["mesh"], *layout["placements"]))
    values[chance.randrange(len(values))] += chance.choice((-1, 1, 2, 2**40))


def files(content: Any, chance: Random) -> None:
    """Name other files, or other sizes and checksums."""
    file = chance.choice(content["files"] + content["companions"])
    which = chance.choice(list(file))
    file[which] = chance.choice(_NAMES) if which == "name" else chance.choice((0, -1, 2**70, str(file[which]), None))


def renamed(content: Any, chance: Random) -> None:
    """Give a tensor, a parameter or a key another name."""
    container = chance.choice((content["tensors"], content, content["topology"]))
    key = chance.choice(list(container))
    container[chance.choice(("", "model/", "optimizer.", "plugin.x.y/z", "x" * 500, key.upper()))] = container.pop(key)


def options(content: Any, chance: Random) -> None:
    """Change an option of the optimizer, a step count, or a value of a scheduler."""
    group, count = chance.choice(content["options"])[0], chance.choice(content["counts"])[0]
    values = chance.choice((group, count, chance.choice(content["schedulers"]), content["files"][0]))
    values[chance.choice((*values, "params"))] = chance.choice((*_JUNK, *_HUGE, {"nemo_dist": "tuple", "value": [1]}))


def dtype(content: Any, chance: Random) -> None:
    """Give a tensor another dtype or shape."""
    stored = content["tensors"][chance.choice(list(content["tensors"]))]
    stored[chance.randrange(2)] = chance.choice((*_DTYPES, *_SHAPES, "float64", "bfloat16"))


def older(content: Any, chance: Random) -> None:
    """Call it format 1, which lists the ranks."""
    content["format"] = 1
    if chance.random() < 0.5:
        ranks = [{"dp_rank": 0, "generators": {}, "data": None, "plugin_states": {}} for _ in content["files"]]
        content["ranks"] = ranks
        chance.choice((junk, missing, encoded))(ranks, chance)


def own(file: bytes, chance: Random) -> bytes:
    """Change what a rank keeps of its own: generators, the state of data and of plugins."""
    tensors = load_tensors(file)
    content = {"own": json.loads(tensors[manifest.OF_RANK].numpy().tobytes())}
    for _ in range(chance.choice((1, 1, 2))):
        with suppress(LookupError, TypeError, ValueError, AttributeError):
            chance.choice((junk, huge, missing, twice, swapped, encoded, deep))(content, chance)
    with _deep():
        text = json.dumps(content.get("own")).encode() if chance.random() < 0.9 else chance.randbytes(40)
    flat = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    tensors[manifest.OF_RANK] = (
        flat if chance.random() < 0.9 else flat.to(chance.choice((torch.float64, torch.bfloat16)))
    )
    return bytes(save_tensors(tensors))


def tensors(file: bytes, chance: Random) -> bytes:
    """Drop, rename, reshape or cast a tensor."""
    found = load_tensors(file)
    name = chance.choice(list(found))
    tensor = found.pop(name)
    changed = {
        "dropped": {},
        "renamed": {name.upper(): tensor},
        "reshaped": {name: tensor.reshape(-1)[: max(0, tensor.numel() - chance.randrange(2))]},
        "cast": {name: tensor.to(chance.choice((torch.int64, torch.float64, torch.bool)))},
    }
    return bytes(save_tensors({**found, **chance.choice(list(changed.values()))}))


def header(file: bytes, chance: Random) -> bytes:
    """Change the header, or put junk in its place."""
    length = int.from_bytes(file[:8], "little")
    content = json.loads(file[8 : 8 + length])
    with suppress(LookupError, TypeError, ValueError, AttributeError):
        chance.choice((junk, huge, missing, twice, swapped))(content, chance)
    text = json.dumps(content).encode() if chance.random() < 0.8 else chance.randbytes(chance.randrange(200))
    size = len(text) if chance.random() < 0.9 else chance.choice((0, 2**63, 10**9, length))
    return size.to_bytes(8, "little") + text + file[8 + length :]


CHANGES = (junk, huge, missing, twice, swapped, encoded, deep, chunks, layouts, files, renamed, options, dtype, older)
FILE_CHANGES = (own, own, tensors, header)
