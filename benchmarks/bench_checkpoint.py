"""Saving and loading weights and AdamW's moments, some 300 MB on 2 ranks: seconds, and how long training is blocked.

Against bare ``torch.distributed.checkpoint`` and transformers' own distributed checkpoints, on the same model and
optimizer, taken in turn in the same processes. All make their files durable, and read them from the page cache. Only
ours writes and verifies checksums, and replaces what was there when the new one is complete.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from figures import Figure
from ranks import on_ranks
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from transformers import LlamaConfig, logging
from transformers.distributed.checkpoint import (  # save_pretrained refuses models that transformers did not shard
    _load_model_checkpoint_distributed,
    _save_model_checkpoint_distributed,
    load_optimizer_distributed,
    save_optimizer_distributed,
)

from nemo_dist import DistributedSetup, NeMoAutoModelForCausalLM, ParallelismSizes

TITLE = "A checkpoint of 25 M float32 parameters and AdamW's moments on 2 ranks"
WORLD = 2
_TURNS = 5
_DCP, _HF = "torch.distributed.checkpoint", "transformers"
_UNCHECKED = "nemo_dist with check_finite=False"
_CHECKED = "save, checking that weights are finite"
_BLOCKED = "blocked by an asynchronous save"
_LIMIT = 1.1
_BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)  # else another topology's optimizer does not load


def measure() -> Iterator[Figure]:
    """Yield the seconds of each operation against each peer; the slowest rank counts."""
    with tempfile.TemporaryDirectory(prefix="nemo_dist_bench_") as name:
        taken = on_ranks(WORLD, run, Path(name))
    for what, peers in (
        ("save", (_DCP, _HF)),
        (_CHECKED, (_UNCHECKED,)),
        ("load", (_DCP, _HF)),
        ("load under another topology", (_DCP, _HF)),
        (_BLOCKED, (_DCP, _HF)),
        ("asynchronous save, until durable", (_DCP,)),
    ):
        ours, *others = (_slowest(taken, what, who) for who in ("nemo_dist", *peers))
        for peer, samples in zip(peers, others, strict=True):
            yield Figure(what=what, unit="s", ours=ours, peer=samples, against=peer, limit=_LIMIT)


def _slowest(taken: list[dict[tuple[str, str], list[float]]], what: str, who: str) -> list[float]:
    return [max(samples) for samples in zip(*(rank[what, who] for rank in taken), strict=True)]


def run(folder: Path) -> dict[tuple[str, str], list[float]]:
    """Run on every rank: take turns at every operation, and return the seconds by operation and by who did it."""
    logging.disable_progress_bar()
    runtime, optimizer = _trained()
    _, (other, other_optimizer) = dist.barrier(), _trained(tp_size=WORLD)
    taken: dict[tuple[str, str], list[float]] = {}

    def save_ours() -> None:
        runtime.save(folder / "ours", optimizer)

    def save_unchecked() -> None:
        runtime.save(folder / "unchecked", optimizer, check_finite=False)

    def load_ours() -> None:
        runtime.load(folder / "ours", optimizer)

    def reshard_ours() -> None:
        other.load(folder / "ours", other_optimizer)

    def save_dcp() -> None:
        dcp.save(_state(runtime.model, optimizer), checkpoint_id=folder / "dcp")

    def load_dcp() -> None:
        _load(runtime.model, optimizer, folder / "dcp")

    def reshard_dcp() -> None:
        _load(other.model, other_optimizer, folder / "dcp")

    def save_hf() -> None:
        _save_model_checkpoint_distributed(runtime.model, str(folder / "hf"))
        save_optimizer_distributed(runtime.model, optimizer, str(folder / "hf-optimizer"))

    def load_hf() -> None:
        _load_hf(runtime.model, optimizer, folder)

    def reshard_hf() -> None:
        _load_hf(other.model, other_optimizer, folder)

    contests: dict[str, dict[str, Callable[[], None]]] = {
        "save": {"nemo_dist": save_ours, _DCP: save_dcp, _HF: save_hf},
        _CHECKED: {"nemo_dist": save_ours, _UNCHECKED: save_unchecked},
        "load": {"nemo_dist": load_ours, _DCP: load_dcp, _HF: load_hf},
        "load under another topology": {"nemo_dist": reshard_ours, _DCP: reshard_dcp, _HF: reshard_hf},
    }
    for turn in range(_TURNS + 1):
        for what, contest in contests.items():
            for who, operation in _rotated(contest, turn):
                _record(taken, what, who, turn, seconds := _timed(operation))
                if (what, who) == ("save", _HF):  # it has no asynchronous save, and is blocked for all of it
                    _record(taken, _BLOCKED, who, turn, seconds)
        for who, begin in _rotated({"nemo_dist": runtime.save, _DCP: _dcp_async(runtime, optimizer)}, turn):
            blocked, durable = _timed_asynchronous(begin, folder / f"asynchronous-{who}", optimizer, who)
            _record(taken, _BLOCKED, who, turn, blocked)
            _record(taken, "asynchronous save, until durable", who, turn, durable)
    return taken


def _rotated(contest: dict[str, Any], turn: int) -> list[tuple[str, Any]]:
    """Who goes first changes every turn, so that nobody always follows the heaviest."""
    items = list(contest.items())
    return items[turn % len(items) :] + items[: turn % len(items)]


def _record(taken: dict[tuple[str, str], list[float]], what: str, who: str, turn: int, seconds: float) -> None:
    if turn:  # the first turn pays for imports and connections
        taken.setdefault((what, who), []).append(seconds)


def _timed(operation: Callable[[], None]) -> float:
    dist.barrier()
    start = time.perf_counter()
    operation()
    return time.perf_counter() - start


def _timed_asynchronous(begin: Any, path: Path, optimizer: Any, who: str) -> tuple[float, float]:
    if dist.get_rank() == 0:
        shutil.rmtree(path, ignore_errors=True)
    dist.barrier()
    start = time.perf_counter()
    handle = begin(path, optimizer, asynchronous=True) if who == "nemo_dist" else begin(path)
    blocked = time.perf_counter() - start
    handle.wait() if who == "nemo_dist" else handle.result()
    return blocked, time.perf_counter() - start


def _dcp_async(runtime: Any, optimizer: Any) -> Callable[[Path], Any]:
    return lambda path: dcp.async_save(_state(runtime.model, optimizer), checkpoint_id=path)


def _state(model: Any, optimizer: Any) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer, options=_BY_NAME)
    return {"model": weights, "optimizer": moments}


def _load(model: Any, optimizer: Any, folder: Path) -> None:
    state = _state(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=_BY_NAME
    )


def _load_hf(model: Any, optimizer: Any, folder: Path) -> None:
    _load_model_checkpoint_distributed(model, str(folder / "hf"))
    load_optimizer_distributed(model, optimizer, str(folder / "hf-optimizer"))


def _trained(**sizes: int) -> tuple[Any, Any]:
    """Return a model and an optimizer that have taken a step."""
    setup = DistributedSetup.build(parallelism_sizes=ParallelismSizes(**sizes))
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=6,
        num_attention_heads=8,
        vocab_size=4096,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = NeMoAutoModelForCausalLM.from_config(config, distributed_setup=setup, dtype=torch.float32)
    runtime = setup.runtime(model)
    optimizer = runtime.optimizer(torch.optim.AdamW, lr=1e-4)
    tokens = torch.randint(0, 4096, (2, 16))
    runtime.forward_backward({"input_ids": tokens, "labels": tokens})
    optimizer.step()
    optimizer.zero_grad()
    return runtime, optimizer
