"""Loading a checkpoint of some 350 million bfloat16 parameters: time, bytes read and peak memory of a rank.

Against transformers' own sharded loading, and against loading all of it and then sharding. Every sample is a new group
of processes; a tiny checkpoint is loaded first, so that imports and connections are not counted. The files are in the
page cache, so no time is a disk's.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.distributed as dist
import transformers
from figures import Figure
from handwritten import shard
from ranks import on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

from nemo_dist import DistributedSetup, NeMoAutoModelForCausalLM
from nemo_dist.testing.io_counter import BytesRead

TITLE = "Loading 355 M bfloat16 parameters on 2 ranks"
WORLD = 2
_ENOUGH = 5  # samples of each loader
_LEAST = 3
_SECONDS = 90  # on a busy machine fewer samples are taken
_MIB = 2**20


@attrs.frozen(kw_only=True)
class Load:
    """What one rank saw: seconds until loaded (wall, CPU) and until every weight was read, peak MiB at both, MiB read.

    ``sums`` has the sum of every local parameter, which must not depend on the loader.
    """

    loaded: float
    cpu: float
    touched: float
    peak_loaded: float
    peak_touched: float
    read: float
    sums: list[float]


def measure() -> Iterator[Figure]:
    """Yield time, memory and bytes against each peer; the worst rank counts."""
    with tempfile.TemporaryDirectory(prefix="nemo_dist_bench_") as name:
        tiny, large = Path(name, "tiny"), Path(name, "large")
        on_ranks(1, write, tiny, large)
        samples: dict[str, list[list[Load]]] = {loader: [] for loader in _LOADERS}
        deadline = time.monotonic() + _SECONDS
        while len(samples["nemo_dist"]) < (_ENOUGH if time.monotonic() < deadline else _LEAST):
            # Who goes first changes every time, so that nobody always follows the heaviest.
            turn = len(samples["nemo_dist"]) % len(_LOADERS)
            for loader in (*list(_LOADERS)[turn:], *list(_LOADERS)[:turn]):
                samples[loader].append(on_ranks(WORLD, load, loader, tiny, large))
            _same_weights({loader: loads[-1] for loader, loads in samples.items()})
    for peer in ("transformers", "load, then shard"):
        for what, unit, field in (
            ("time to load", "s", "loaded"),
            ("CPU time to load", "s", "cpu"),
            ("time to load and read every weight", "s", "touched"),
            ("peak memory of loading", "MiB", "peak_loaded"),
            ("peak memory, every weight read", "MiB", "peak_touched"),
            ("bytes read", "MiB", "read"),
        ):
            values = {loader: [_worst(ranks, field) for ranks in loads] for loader, loads in samples.items()}
            yield Figure(what=what, unit=unit, ours=values["nemo_dist"], peer=values[peer], against=peer)


def _worst(ranks: list[Load], field: str) -> float:
    return max(float(getattr(rank, field)) for rank in ranks)


def _same_weights(loads: dict[str, list[Load]]) -> None:
    for loader, ranks in loads.items():
        if [rank.sums for rank in ranks] != [rank.sums for rank in loads["nemo_dist"]]:
            raise RuntimeError(f"{loader!r} loaded other shards than nemo_dist, so the figures do not compare")


def write(tiny: Path, large: Path) -> None:
    """Write a tiny and a large checkpoint with random weights."""
    transformers.utils.logging.disable_progress_bar()
    _model(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=256).save_pretrained(tiny)
    _model(hidden_size=1024, intermediate_size=2560, num_hidden_layers=24, vocab_size=32000).save_pretrained(large)


def _model(**sizes: Any) -> Any:
    config = LlamaConfig(num_attention_heads=sizes["hidden_size"] // 64, tie_word_embeddings=False, **sizes)
    config.dtype = torch.bfloat16
    return transformers.AutoModelForCausalLM.from_config(config)


def load(loader: str, tiny: Path, large: Path) -> Load:
    """Run on every rank: load the large checkpoint with *loader* and read every local weight."""
    transformers.utils.logging.disable_progress_bar()
    _read(_LOADERS[loader](tiny))
    dist.barrier()
    memory, start, cpu = _peak(), time.perf_counter(), time.process_time()
    with BytesRead() as reading:
        model = _LOADERS[loader](large)
    loaded, cpu, peak_loaded = time.perf_counter() - start, time.process_time() - cpu, _peak() - memory
    sums = _read(model)
    return Load(
        loaded=loaded,
        cpu=cpu,
        touched=time.perf_counter() - start,
        peak_loaded=peak_loaded,
        peak_touched=_peak() - memory,
        read=reading.bytes / _MIB,
        sums=sums,
    )


def _read(model: Any) -> list[float]:
    with torch.no_grad():
        return [_local(parameter).sum().item() for parameter in model.parameters()]


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _peak() -> float:
    """Return the most memory that this process has had resident, mapped pages of files included, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (_MIB if sys.platform == "darwin" else 1024)


def _nemo_dist(folder: Path) -> Any:
    return NeMoAutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, distributed_setup=DistributedSetup.build()
    )


def _transformers(folder: Path) -> Any:
    # It asks for accelerate before it takes a device, and then has no use for it with a single one.
    vars(transformers.integrations.accelerate)["is_accelerate_available"] = lambda: True
    config = DistributedConfig(fsdp_size=dist.get_world_size())
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, distributed_config=config)


def _load_then_shard(folder: Path) -> Any:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return shard(model, init_device_mesh("cpu", (dist.get_world_size(),)))


_LOADERS = {"nemo_dist": _nemo_dist, "transformers": _transformers, "load, then shard": _load_then_shard}
