"""What the device waits for in a step, and what attention over a split sequence costs."""

from __future__ import annotations

import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from exactness import EXACT, calls_of, loaded
from record import Place, Record
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from nemo_dist.testing.equivalence import Task
from nemo_dist_fsdp2 import FSDP2Config
from nemo_dist_megatron_fsdp import MegatronFSDPConfig


def synchronisations(place: Place, record: Record) -> None:
    """Where a third step makes the host wait for the device, with the file and line that does."""
    exact = FSDP2Config(mp_policy=EXACT)
    cases: list[tuple[str, Any, str, dict[str, Any]]] = [
        ("fsdp2", exact, "llama", {}),
        ("fsdp2, padded rows", exact, "llama-padded", {}),
        ("fsdp2, recompute", exact, "llama", {"activation_checkpointing": True}),
        ("fsdp2, experts", exact, "qwen3-moe", {}),
        ("ddp", "ddp", "llama", {}),
        ("megatron_fsdp", MegatronFSDPConfig(), "llama", {}),
    ]
    with calls_of(place), place.one_rank():
        for name, strategy, specimen, options in cases:
            with record.attempt(name):
                task = Task(specimen=specimen)
                runtime = loaded(place, task, strategy, **options)
                optimizer = runtime.optimizer(torch.optim.AdamW, lr=1e-3)
                for step in range(3):
                    batch = task.batches(step)[0]
                    found = _counted(
                        place, step == 2, lambda batch=batch, runtime=runtime, o=optimizer: _step(runtime, o, batch)
                    )
                record.note(name, {"count": sum(found.values()), **found})


def _step(runtime: Any, optimizer: Any, batch: Any) -> None:
    runtime.forward_backward(batch)
    runtime.clip_grad_norm_(1.0)
    optimizer.step()
    optimizer.zero_grad()


def _counted(place: Place, counting: bool, step: Callable[[], None]) -> dict[str, int]:
    if not (place.cuda and counting):
        step()
        return {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = Counter(
        f"{'/'.join(one.filename.split('/')[-2:])}:{one.lineno}" for one in caught if "synchroniz" in str(one.message)
    )
    return dict(places)


def attention(place: Place, record: Record) -> None:
    """Forward and backward of the second half of the queries: time, peak memory, and the kernels."""
    heads, shared, width, length = (32, 8, 128, 16384) if place.cuda else (4, 2, 8, 64)
    dtype = torch.bfloat16 if place.cuda else torch.float32
    query, key, value = (
        torch.randn(1, n, rows, width, device=place.device, dtype=dtype, requires_grad=True)
        for n, rows in ((heads, length // 2), (shared, length), (shared, length))
    )
    mask = torch.ones(length // 2, length, dtype=torch.bool, device=place.device).tril(length // 2)
    bias: Any = causal_lower_right(length // 2, length)

    def repeated(given: Any) -> Tensor:
        many = heads // shared
        return scaled_dot_product_attention(
            query, key.repeat_interleave(many, 1), value.repeat_interleave(many, 1), given
        )

    ways: dict[str, Callable[[], Tensor]] = {
        "boolean mask, heads repeated": lambda: repeated(mask),
        "boolean mask, enable_gqa": lambda: scaled_dot_product_attention(query, key, value, mask, enable_gqa=True),
        "causal bias, heads repeated": lambda: repeated(bias),
        "causal bias, enable_gqa": lambda: scaled_dot_product_attention(query, key, value, bias, enable_gqa=True),
    }
    expected = repeated(mask).detach().float()
    for name, way in ways.items():
        with record.attempt(name):
            error = ((way().detach().float() - expected).norm() / expected.norm()).item()
            place.forget_peak()
            before = torch.cuda.memory_allocated() / 2**20 if place.cuda else 0.0
            times = [_milliseconds(place, lambda way=way: way().sum().backward()) for _ in range(6)][1:]
            record.judge(
                name, error < 1e-2,
                f"{statistics.median(times):.2f} ms, {place.peak() - before:.0f} MiB, off by {error:.1e}, "
                f"kernels {_kernels(place, way)}",
            )  # fmt: skip


def _milliseconds(place: Place, run: Callable[[], object]) -> float:
    place.settle()
    start = time.perf_counter()
    run()
    place.settle()
    return 1e3 * (time.perf_counter() - start)


def _kernels(place: Place, way: Callable[[], Tensor]) -> list[str]:
    if not place.cuda:
        return []
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        way().sum().backward()
        place.settle()
    ranked = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)
    return [event.key[:70] for event in ranked[:3]]
