"""Forge the headers of safetensors files of a model, and load it: it loads, or is refused in words on all ranks."""

from __future__ import annotations

import json
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import torch.distributed as dist

from campaign.forks import call
from campaign.manifests import header, tensors
from campaign.tally import Tally
from campaign.tiny_run import TinyRun
from nemo_dist import NemoDistError

_INDEX = "model.safetensors.index.json"
_LONGEST = 10_000  # characters of a message


def run(count: int, chance: Random, folder: Path) -> Iterator[Tally]:
    """Yield the counts for one file, for several with an index, and on two ranks."""
    for name, size, world, share in (
        ("forged headers, from_pretrained", "5GB", 1, count),
        ("the same, several files", "2KB", 1, count // 2),
        ("the same, 2 ranks", "5GB", 2, count // 4),
    ):
        place = folder / name.replace(" ", "-").replace(",", "")
        tallies = call(world, on_rank_forge, name, size, max(1, share), chance, place)
        yield max(tallies, key=lambda tally: len(tally.lost))


def on_rank_forge(tell: Callable[..., None], name: str, size: str, count: int, chance: Random, folder: Path) -> Tally:
    """Forge a file of the model, load it, and mend the file."""
    warnings.simplefilter("ignore")
    tally, place = Tally(name), folder / "model"
    TinyRun().runtime.export(place, max_shard_size=size)
    whole = {path: path.read_bytes() for path in sorted(place.glob("*.safetensors*"))}
    for _ in range(count):
        path = chance.choice(list(whole))
        forged = forge(path, whole[path], chance)
        _write(path, forged)
        try:
            TinyRun(origin=place)
            problem = refused = ""
        except NemoDistError as error:
            refused = str(error)
            problem = f"a message of {len(refused)} characters: {refused[:200]}" if len(refused) > _LONGEST else ""
        except BaseException as error:
            refused, problem = "raw", f"{type(error).__name__}: {error}\n{_last(error)}"
        if problem:
            tally.lose(f"{path.name} {forged[8:200]!r}...: {problem}")
        else:
            tally.refuse() if refused else tally.survive()
        _write(path, whole[path])
    return tally


def forge(path: Path, content: bytes, chance: Random) -> bytes:
    """Return *content* with another header, other tensors, cut, or with junk in its index."""
    if path.name == _INDEX:
        index = json.loads(content)
        files = index["weight_map"]
        files[chance.choice(list(files))] = chance.choice(("../model.safetensors", "gone.safetensors", "", None, 3, []))
        return json.dumps(chance.choice((index, {}, [], {"weight_map": 3}))).encode()
    kind = chance.random()
    if kind < 0.6:
        return header(content, chance)
    if kind < 0.85:
        return tensors(content, chance)
    return content[: chance.randrange(len(content))]


def _write(path: Path, content: bytes) -> None:
    """Have one rank write *content* when all have read what was there."""
    dist.barrier()
    if dist.get_rank() == 0:
        path.unlink(missing_ok=True)  # what is memory-mapped stays as it is
        path.write_bytes(content)
    dist.barrier()


def _last(error: BaseException) -> str:
    return "".join(traceback.format_tb(error.__traceback__)[-2:])
