"""Step time of each strategy against the same model in hand-written torch, step by step in turn in the same processes.

The hand-written side is what a careful person writes for one strategy, in float32: ``fully_shard`` per block with the
same groups and policies, or ``DistributedDataParallel``; token counts summed over the ranks, the loss weighted by them,
and the global loss reported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs
import torch
import torch.distributed as dist
from figures import Figure
from handwritten import llama, shard
from ranks import on_ranks
from steps import FP32, LIMIT, Step, Times, batches, by_hand, figures, in_turn, of_runtime
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM

from nemo_dist import DDPConfig, DistributedSetup, FSDP2Config, NeMoAutoModelForCausalLM, ParallelismSizes

TITLE = "A training step, against hand-written torch"


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
    """Yield wall and CPU time of a step for each strategy."""
    for case in CASES:
        ours, peer = on_ranks(case.world, compare, case)[0]
        yield from figures(f"{case.strategy} step, {case.world} ranks", ours, peer, "hand-written torch", LIMIT)


def compare(case: Case) -> list[list[Times]]:
    """Run on every rank: take steps of both in turn and return the times of each."""
    return in_turn((_ours(case), _peer(case)), batches(case.rows, case.length, dist.get_rank()), alike=2)


def _ours(case: Case) -> Step:
    torch.manual_seed(0)
    strategy = DDPConfig() if case.strategy == "ddp" else FSDP2Config(mp_policy=FP32)
    sizes = ParallelismSizes(dp_replicate_size=2) if case.strategy == "hsdp" else None
    setup = DistributedSetup.build(strategy=strategy, parallelism_sizes=sizes)
    return of_runtime(setup, NeMoAutoModelForCausalLM.from_config(llama(), distributed_setup=setup).train())


def _peer(case: Case) -> Step:
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama()).train()
    wrapped: Any = DistributedDataParallel(model) if case.strategy == "ddp" else _sharded(model, case)
    return by_hand(model, lambda batch: wrapped(**batch).loss, ranks=case.world)


def _sharded(model: LlamaForCausalLM, case: Case) -> nn.Module:
    shape, names = ((2, 2), ("replicate", "shard")) if case.strategy == "hsdp" else ((case.world,), ("shard",))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    return shard(model, mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32))
