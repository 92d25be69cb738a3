"""A pipeline's step against hand-written ``torch.distributed.pipelining``, and how long its ranks idle against theory.

The hand-written side has the same stages as plain modules, the same schedule and the same optimizer; around it stands
what a careful person adds: the token count, the norm over all stages, and the loss on every rank. Steps of both are
taken in turn in the same processes and must give the same loss.

A rank is busy while it runs the forward or a backward of a microbatch, and idle for the rest of a step. Two ranks
compute; four would share the cores of a small machine, so the stages of the second table sleep instead: a unit of time
for a forward, one for a backward for the inputs, one for the weights. That measures what the schedule itself, and all
that surrounds it, leaves idle.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, ClassVar

import attrs
import torch
import torch.distributed as dist
from bench_step import _enough
from figures import Figure
from handwritten import LlamaStage, shard_stage
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_dist import DistributedSetup, FSDP2Config, NeMoAutoModelForCausalLM, ParallelismSizes, PipelineConfig, Stage
from nemo_dist_pipeline import named
from nemo_dist_pipeline.stage import ModelStage

TITLE = "A pipeline's step against hand-written torch.distributed.pipelining, and its idle time against theory"
LIMIT = 1.03
_WARM_UP = 2
_SECONDS = 40  # of one case: on a busy machine fewer pairs are taken
_STEPS = 5  # measured for each idle share
_UNIT = 0.02  # seconds that a sleeping forward takes
_FP32 = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
_Times = tuple[float, float]  # wall and CPU, milliseconds
_Step = Callable[[dict[str, Tensor]], float]


@attrs.frozen(kw_only=True)
class Case:
    """A *schedule* on ``pp`` of ``world`` ranks; a data-parallel rank sees ``count`` microbatches of ``size`` rows."""

    schedule: str
    strategy: str = "none"
    world: int = 2
    pp: int = 2
    count: int = 8
    size: int = 2
    length: int = 128
    width: int = 256
    layers: int = 8

    @property
    def rows(self) -> int:
        """The rows of a batch."""
        return self.count * self.size


COMPARED = (
    Case(schedule="1F1B"),
    Case(schedule="Interleaved1F1B"),
    Case(schedule="ZBVZeroBubble"),
    Case(schedule="1F1B", strategy="fsdp2", world=4, count=4),  # two shards of every stage
)
WATCHED = ("GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble")


def measure() -> Iterator[Figure]:
    """Yield wall and CPU time of a step in milliseconds, and idle shares in percent."""
    for case in COMPARED:
        ours, peer = on_ranks(case.world, compare, case)[0]
        shards = f", {case.strategy}" if case.strategy != "none" else ""
        for clock, what in enumerate(("", ", CPU time")):
            yield Figure(
                what=f"{case.schedule} step, pp {case.pp}{shards}, {case.world} ranks{what}",
                unit="ms",
                ours=[times[clock] for times in ours],
                peer=[times[clock] for times in peer],
                against="hand-written pipelining",
                limit=LIMIT,
            )
    for pp, asleep in ((2, False), (2, True), (4, True)):
        small = {"length": 8, "width": 32, "size": 1} if asleep else {}
        cases = [Case(schedule=name, world=pp, pp=pp, **small) for name in WATCHED]
        watched = on_ranks(pp, watch, cases, _UNIT if asleep else None)
        for case, *steps in zip(cases, *watched, strict=True):
            yield _idle(case, steps, asleep)


def _idle(case: Case, steps: list[list[tuple[float, float]]], asleep: bool) -> Figure:
    """Return the share of the ranks' time that was idle in the *steps* of each rank, beside the theoretical one."""
    shares = [
        100 * (1 - sum(busy for _, busy in ranks) / (case.world * max(wall for wall, _ in ranks)))
        for ranks in zip(*steps, strict=True)
    ]
    schedule = named(case.schedule)
    theory = 100 * schedule.bubble(case.pp, schedule.per_rank, case.count)
    how = "stages that sleep" if asleep else "stages that compute"
    return Figure(
        what=f"idle, {case.schedule}, pp {case.pp}, {how}",
        unit="%",
        ours=shares,
        peer=[theory] * len(shares),
        against="theory",
    )


# ---- a step against hand-written torch ----


def compare(case: Case) -> tuple[list[_Times], list[_Times]]:
    """Run on every rank: take steps of both in turn and return the wall and CPU times of each."""
    batches = _batches_of(case)
    steps = (_ours(case), _peer(case))
    taken: tuple[list[_Times], list[_Times]] = ([], [])
    deadline = time.monotonic() + _SECONDS
    while not _enough(len(taken[0]), deadline):
        batch = next(batches)
        losses = [0.0, 0.0]
        # Who goes first changes every time: the second finds warmer caches.
        for which in (0, 1) if len(taken[0]) % 2 == 0 else (1, 0):
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            losses[which] = steps[which](batch)
            taken[which].append((1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)))
        if abs(losses[0] - losses[1]) > 1e-4 * abs(losses[1]):
            raise RuntimeError(f"both train the same model on the same data, but the losses are {losses}")
    return taken[0][_WARM_UP:], taken[1][_WARM_UP:]


def _batches_of(case: Case) -> Iterator[dict[str, Tensor]]:
    """Yield the batches of this data-parallel rank, the same on all its pipeline ranks; some labels are masked."""
    generator = torch.Generator().manual_seed(dist.get_rank() % (case.world // case.pp))
    while True:
        tokens = torch.randint(0, _config(case).vocab_size, (case.rows, case.length), generator=generator)
        masked = torch.rand(tokens.shape, generator=generator) < 0.2
        yield {"input_ids": tokens, "labels": tokens.masked_fill(masked, -100)}


def _config(case: Case) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=4 * case.width,
        hidden_size=case.width,
        intermediate_size=11 * case.width // 4,
        num_hidden_layers=case.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=256,
        use_cache=False,
    )


@attrs.frozen(eq=False)
class Nothing:
    """A strategy for one data-parallel rank that does nothing, as the hand-written side does without shards."""

    name, stage = "nothing", Stage.DATA
    config_type: ClassVar[type] = type(None)
    axes, composes_with = frozenset({"dp_shard", "dp_replicate"}), frozenset({"pp"})
    config: object = None


def _pipeline(case: Case) -> tuple[DistributedSetup, Any]:
    torch.manual_seed(0)
    setup = DistributedSetup.build(
        strategy=FSDP2Config(mp_policy=_FP32) if case.strategy == "fsdp2" else Nothing(),
        parallelism_sizes=ParallelismSizes(pp_size=case.pp),
        pipeline_config=PipelineConfig(pp_schedule=case.schedule, pp_microbatch_size=case.size),
    )
    return setup, NeMoAutoModelForCausalLM.from_config(_config(case), distributed_setup=setup).train()


def _ours(case: Case) -> _Step:
    setup, pipeline = _pipeline(case)
    runtime = setup.runtime(pipeline)
    optimizer = runtime.optimizer(torch.optim.AdamW, lr=1e-4)

    def step(batch: dict[str, Tensor]) -> float:
        loss = runtime.forward_backward(batch)
        runtime.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def _peer(case: Case) -> _Step:
    _, pipeline = _pipeline(case)
    stages, shards = pipeline.info.stages, case.world // case.pp
    torch.manual_seed(0)
    whole = LlamaForCausalLM(_config(case)).train()
    mesh = init_device_mesh("cpu", (case.pp, shards), mesh_dim_names=("pp", "dp"))
    parts = [
        LlamaStage(
            whole,
            [int(name.rsplit(".", 1)[1]) for name in stage.modules if ".layers." in name],
            stage.is_first,
            stage.is_last,
        )
        for stage in stages
    ]
    if shards > 1:
        parts = [shard_stage(part, mesh["dp"], mp_policy=_FP32) for part in parts]
    group = mesh["pp"].get_group()
    built = [
        PipelineStage(part, stage.index, stage.count, torch.device("cpu"), group=group)
        for part, stage in zip(parts, stages, strict=True)
    ]
    count = torch.zeros(())  # of the labels in all batches, which the loss of every microbatch is divided by

    def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
        flat = logits[:, :-1].flatten(0, 1).float()
        return cross_entropy(flat, labels[:, 1:].flatten(), reduction="sum") * (shards / count)

    kind = get_schedule_class(case.schedule)
    single = issubclass(kind, PipelineScheduleSingle)
    schedule = kind(built[0] if single else built, case.count, loss_fn=loss_of, scale_grads=False)
    parameters = [parameter for part in parts for parameter in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    has_first, has_last = pipeline.info.has_first_stage, pipeline.info.has_last_stage

    def step(batch: dict[str, Tensor]) -> float:
        count.copy_((batch["labels"][:, 1:] != -100).sum())
        if shards > 1:
            dist.all_reduce(count, group=mesh["dp"].get_group())
        losses: list[Tensor] = []
        inputs = (batch["input_ids"],) if has_first else ()
        schedule.step(*inputs, target=batch["labels"] if has_last else None, losses=losses, return_outputs=False)
        total = torch.stack(losses).sum() / shards if has_last else torch.zeros(())
        dist.all_reduce(total)
        _clip(parameters, group)
        optimizer.step()
        optimizer.zero_grad()
        return float(total)

    return step


def _clip(parameters: list[nn.Parameter], group: dist.ProcessGroup) -> None:
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    square = (norm.full_tensor() if isinstance(norm, DTensor) else norm) ** 2
    dist.all_reduce(square, group=group)
    nn.utils.clip_grads_with_norm_(parameters, 1.0, square.sqrt())


# ---- idle time ----


def watch(cases: Sequence[Case], unit: float | None) -> list[list[tuple[float, float]]]:
    """Run on every rank: return, for each step of each case, how long it took and how long this rank was busy, seconds.

    ``unit``: let every piece of work last so long, instead of what it takes.
    """
    return [_watch(case, unit) for case in cases]


def _watch(case: Case, unit: float | None) -> list[tuple[float, float]]:
    _, pipeline = _pipeline(case)
    batches = _batches_of(case)
    taken = []
    with _watched(unit) as busy:
        for _ in range(_WARM_UP + _STEPS):
            batch = next(batches)
            dist.barrier()
            busy.clear()
            started = time.perf_counter()
            pipeline.step(batch)
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
