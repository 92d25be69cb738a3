"""How long the ranks of a pipeline are idle in a step, against the theoretical bubble that ``explain`` gives.

A rank is busy while it runs the forward or a backward of a microbatch, and idle for the rest of a step. Two ranks
compute; four would share the cores of a small machine, so there the stages sleep instead: a unit of time for a forward,
one for a backward for the inputs, one for the weights. That measures what the schedule, and all that surrounds it,
leaves idle.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch.distributed as dist
from bench_pipeline import Case, pipeline
from figures import Figure
from handwritten import llama
from ranks import on_ranks
from steps import VOCABULARY
from transformers import LlamaConfig

from nemo_dist_pipeline import named
from nemo_dist_pipeline.runtime.torch_stage import ModelStage

TITLE = "Idle time of pipeline ranks, against theory"
_WARM_UP = 2
_STEPS = 7
_UNIT = 0.03  # seconds that a sleeping forward takes
_NAMES = ("GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble")
Steps = list[tuple[float, float]]  # how long each took, and how long the rank was busy, in seconds


def measure() -> Iterator[Figure]:
    """Yield the idle share of the ranks' time for each schedule, in percent."""
    for pp, asleep in ((2, False), (2, True), (4, True)):
        small: dict[str, Any] = {"length": 8, "size": 1, "model": _tiny()} if asleep else {"model": llama()}
        cases = [Case(schedule=name, world=pp, pp=pp, **small) for name in _NAMES]
        watched = on_ranks(pp, watch, cases, _UNIT if asleep else None)
        for case, *steps in zip(cases, *watched, strict=True):
            yield _idle(case, steps, asleep)


def _tiny() -> LlamaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=8, max_position_embeddings=64, use_cache=False, **sizes)


def _idle(case: Case, steps: Sequence[Steps], asleep: bool) -> Figure:
    """Return the share of the ranks' time that was idle in the *steps* of each rank, beside the theoretical one."""
    shares = [
        100 * (1 - sum(busy for _, busy in ranks) / (case.world * max(wall for wall, _ in ranks)))
        for ranks in zip(*steps, strict=True)
    ]
    schedule = named(case.schedule)
    theory = 100 * schedule.bubble(case.pp, schedule.per_rank, case.count)
    return Figure(
        what=f"idle, {case.schedule}, pp {case.pp}, stages {'sleep' if asleep else 'compute'}",
        unit="%",
        ours=shares,
        peer=[theory] * len(shares),
        against="theory",
    )


def watch(cases: Sequence[Case], unit: float | None) -> list[Steps]:
    """Run on every rank: return the steps of each case.

    ``unit``: let every piece of work last so long, instead of what it takes.
    """
    return [_watch(case, unit) for case in cases]


def _watch(case: Case, unit: float | None) -> Steps:
    _, model = pipeline(case)
    batches = case.batches
    taken = []
    with _watched(unit) as busy:
        for _ in range(_WARM_UP + _STEPS):
            batch = next(batches)
            dist.barrier()
            busy.clear()
            started = time.perf_counter()
            model.step(batch)
            taken.append((time.perf_counter() - started, sum(busy)))
    return taken[_WARM_UP:]


@contextmanager
def _watched(unit: float | None) -> Iterator[list[float]]:
    """Within the context every piece of work of a stage appends its seconds to the list."""
    busy: list[float] = []
    originals = {name: getattr(ModelStage, name) for name in _WORK}
    for name, units in _WORK.items():
        setattr(ModelStage, name, _timed(originals[name], busy, units, unit))
    try:
        yield busy
    finally:
        for name, original in originals.items():
            setattr(ModelStage, name, original)


_WORK: dict[str, Callable[[dict[str, Any]], int]] = {
    "forward_one_chunk": lambda options: 1,
    "backward_one_chunk": lambda options: 2 if options.get("full_backward", True) else 1,
    "backward_weight_one_chunk": lambda options: 1,
}


def _timed(work: Any, busy: list[float], units: Callable[[dict[str, Any]], int], unit: float | None) -> Any:
    @wraps(work)
    def timed(*args: Any, **options: Any) -> Any:
        started = time.perf_counter()
        found = work(*args, **options)
        if unit is not None:
            time.sleep(max(0.0, units(options) * unit - (time.perf_counter() - started)))
        busy.append(time.perf_counter() - started)
        return found

    return timed
