"""Several ranks on one card, which NCCL refuses: the axes with real CUDA kernels, and collectives through the host."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import staged
import torch
import torch.distributed as dist
from exactness import EXACT, calls_of, compare, plain
from record import Place, Record

from nemo_dist import ParallelismSizes
from nemo_dist.testing.equivalence import Task, checkpoint, merged, train_on_rank
from nemo_dist_context import ContextConfig
from nemo_dist_fsdp2 import FSDP2Config
from nemo_dist_megatron_fsdp import MegatronFSDPConfig

_FSDP2 = FSDP2Config(mp_policy=EXACT)
_LIMIT = 45.0  # seconds of a case


def _cases() -> list[tuple[str, int, str, dict[str, Any]]]:
    def sizes(**axes: int) -> dict[str, Any]:
        return {"strategy": _FSDP2, "parallelism_sizes": ParallelismSizes(**axes)}

    return [
        ("fsdp2", 2, "llama", sizes()),
        ("ddp", 2, "llama", {"strategy": "ddp"}),
        ("hsdp", 4, "llama", sizes(dp_replicate_size=2)),
        ("tp", 2, "llama", sizes(tp_size=2)),
        (
            "tp, sequence parallel",
            2,
            "llama",
            {**sizes(tp_size=2), "strategy": FSDP2Config(mp_policy=EXACT, sequence_parallel=True)},
        ),
        ("cp", 2, "llama", sizes(cp_size=2)),
        ("cp, padded rows", 2, "llama-padded", sizes(cp_size=2)),
        ("cp, ulysses", 2, "llama", {**sizes(cp_size=2), "plugins": (ContextConfig(method="ulysses"),)}),
        ("cp, ring", 2, "llama", {**sizes(cp_size=2), "plugins": (ContextConfig(method="ring"),)}),
        ("ep", 2, "qwen3-moe", sizes(ep_size=2)),
        ("fsdp2 x tp", 4, "llama", sizes(tp_size=2)),
        ("cp x tp", 4, "llama", sizes(tp_size=2, cp_size=2)),
        ("ep x tp", 4, "qwen3-moe", sizes(tp_size=2, ep_size=2)),
        ("megatron_fsdp ZeRO 3", 2, "llama", {"strategy": MegatronFSDPConfig(zero_dp_strategy=3)}),
        ("megatron_fsdp ZeRO 2", 2, "llama", {"strategy": MegatronFSDPConfig(zero_dp_strategy=2)}),
        ("megatron_fsdp ZeRO 1", 2, "llama", {"strategy": MegatronFSDPConfig(zero_dp_strategy=1)}),
        ("fsdp2, offload", 2, "llama", {"strategy": FSDP2Config(mp_policy=EXACT, offload_policy="cpu")}),
    ]


def ranks_on_one_card(place: Place, record: Record) -> None:
    """Every axis on 2 or 4 ranks against one process on the same device."""
    _run(place, record, _cases())


def pipeline_on_one_card(place: Place, record: Record) -> None:
    """Pipelines on 2 ranks."""
    sizes = {"strategy": _FSDP2, "parallelism_sizes": ParallelismSizes(pp_size=2)}
    _run(place, record, [("pp", 2, "llama-deep", {**sizes, "pipeline_config": {"pp_microbatch_size": 2}})])


def _run(place: Place, record: Record, cases: Sequence[tuple[str, int, str, dict[str, Any]]]) -> None:
    tasks = {name: Task(specimen=specimen) for name, _, specimen, _ in cases}
    for task in tasks.values():
        checkpoint(task.specimen, task.seed)
    found = {}
    for name, world, _, options in cases:
        with record.attempt(name):
            found[name] = _on_ranks(place, world, tasks[name], options)
    for name, outcomes in found.items():  # CUDA starts in this process only now, as the ranks are forked from it
        with record.attempt(name):
            compare(record, name, merged(outcomes), plain(tasks[name], place))


def _on_ranks(place: Place, world: int, task: Task, options: Mapping[str, Any]) -> list[Any]:
    folder = place.folder / f"{time.monotonic_ns()}"
    folder.mkdir()
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_rank, args=(place, rank, world, folder, task, options)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + _LIMIT
    for process in processes:
        process.join(max(0.1, deadline - time.monotonic()))
    late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    failures = [path.read_text() for path in sorted(folder.glob("error-*"))]
    if failures:
        raise RuntimeError(failures[0][-1200:])
    if late:
        raise TimeoutError(f"ranks {late} of {world} did not end within {_LIMIT:.0f} s")
    return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(world)]


def _rank(place: Place, rank: int, world: int, folder: Path, task: Task, options: Mapping[str, Any]) -> None:
    try:
        if place.cuda:
            torch.cuda.set_device(0)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0"}
        staged.register()
        dist.init_process_group(
            staged.NAME,
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=40),
        )
        with calls_of(place):
            outcome = train_on_rank(
                task, checkpoint(task.specimen, task.seed), {**options, "device_type": place.device_type}
            )
        (folder / f"result-{rank}").write_bytes(pickle.dumps(outcome))
    except BaseException:
        (folder / f"error-{rank}").write_text(traceback.format_exc())
    finally:
        os._exit(0)
