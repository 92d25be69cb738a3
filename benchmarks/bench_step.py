"""Step time of each strategy against the same model in hand-written torch, step by step in turn in the same processes.

Wall time of rank 0, and the CPU time of its process, which other work on the machine disturbs far less. A step is
forward, backward, gradient clipping and AdamW, in float32. The hand-written side is what a careful person writes for
one strategy: ``fully_shard`` per block with the same groups and policies, or ``DistributedDataParallel``; token counts
summed over the ranks, the loss weighted by them, and the global loss reported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import torch
import torch.distributed as dist
from figures import Figure
from handwritten import shard
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_dist import DDPConfig, DistributedSetup, FSDP2Config, NeMoAutoModelForCausalLM, ParallelismSizes

TITLE = "A training step, against hand-written torch"
LIMIT = 1.03
_WARM_UP = 3
_ENOUGH = 40  # pairs of steps
_LEAST = 8
_SECONDS = 60  # of one case: on a busy machine fewer pairs are taken
_FP32 = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
_Times = tuple[float, float]  # wall and CPU, milliseconds
_Step = Callable[[dict[str, Tensor]], float]


@attrs.frozen(kw_only=True)
class Case:
    """A strategy on ``world`` ranks, each of which sees ``rows`` sequences of ``length`` tokens in a step."""

    strategy: str
    world: int
    rows: int = 4
    length: int = 128


CASES = (
    Case(strategy="fsdp2", world=2),
    Case(strategy="ddp", world=2),
    Case(strategy="hsdp", world=4, rows=2),  # the least ranks that have both axes
)


def measure() -> Iterator[Figure]:
    """Yield wall and CPU time of a step for each strategy, in milliseconds."""
    for case in CASES:
        ours, peer = on_ranks(case.world, compare, case)[0]
        for clock, what in enumerate(("", ", CPU time")):
            yield Figure(
                what=f"{case.strategy} step, {case.world} ranks{what}",
                unit="ms",
                ours=[times[clock] for times in ours],
                peer=[times[clock] for times in peer],
                against="hand-written torch",
                limit=LIMIT,
            )


def compare(case: Case) -> tuple[list[_Times], list[_Times]]:
    """Run on every rank: take steps of both in turn and return the wall and CPU times of each."""
    batches = _batches(case)
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


def _enough(pairs: int, deadline: float) -> bool:
    """Whether to stop after *pairs* pairs; the ranks must agree, and their clocks do not."""
    late = torch.tensor(float(time.monotonic() > deadline))
    dist.all_reduce(late)
    return pairs >= _WARM_UP + (_LEAST if late else _ENOUGH)


def _config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=256,
        use_cache=False,
    )


def _batches(case: Case) -> Iterator[dict[str, Tensor]]:
    """Yield batches of this rank, some labels masked."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    while True:
        tokens = torch.randint(0, 4096, (case.rows, case.length), generator=generator)
        masked = torch.rand(tokens.shape, generator=generator) < 0.2
        yield {"input_ids": tokens, "labels": tokens.masked_fill(masked, -100)}


def _ours(case: Case) -> _Step:
    torch.manual_seed(0)
    strategy = DDPConfig() if case.strategy == "ddp" else FSDP2Config(mp_policy=_FP32)
    sizes = ParallelismSizes(dp_replicate_size=2) if case.strategy == "hsdp" else None
    setup = DistributedSetup.build(strategy=strategy, parallelism_sizes=sizes)
    runtime = setup.runtime(NeMoAutoModelForCausalLM.from_config(_config(), distributed_setup=setup).train())
    optimizer = runtime.optimizer(torch.optim.AdamW, lr=1e-4)

    def step(batch: dict[str, Tensor]) -> float:
        loss = runtime.forward_backward(batch)
        runtime.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def _peer(case: Case) -> _Step:
    torch.manual_seed(0)
    model = LlamaForCausalLM(_config()).train()
    wrapped: Any = DistributedDataParallel(model) if case.strategy == "ddp" else _sharded(model, case)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ranks = dist.get_world_size()

    def step(batch: dict[str, Tensor]) -> float:
        count = (batch["labels"][:, 1:] != -100).sum().float()
        total = count.clone()
        dist.all_reduce(total)
        loss = wrapped(**batch).loss * (count / total * ranks)  # the gradients are averaged over the ranks
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if isinstance(norm, DTensor):
            norm.full_tensor()
        optimizer.step()
        optimizer.zero_grad()
        whole = loss.detach() / ranks
        dist.all_reduce(whole)
        return float(whole)

    return step


def _sharded(model: LlamaForCausalLM, case: Case) -> nn.Module:
    shape, names = ((2, 2), ("replicate", "shard")) if case.strategy == "hsdp" else ((case.world,), ("shard",))
    return shard(model, init_device_mesh("cpu", shape, mesh_dim_names=names), mp_policy=_FP32)
