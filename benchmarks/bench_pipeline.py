"""A pipeline's step against hand-written ``torch.distributed.pipelining``, in turn in the same processes.

The hand-written side has the same stages as plain modules, the same schedule and the same optimizer; around it stands
what a careful person adds: the token count, the norm over all stages, and the loss on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import attrs
import torch
import torch.distributed as dist
from figures import Figure
from handwritten import LlamaStage, llama, shard_stage
from ranks import on_ranks
from steps import FP32, LIMIT, Batch, Step, Times, batches, figures, in_turn, of_runtime
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_dist import DistributedSetup, FSDP2Config, NeMoAutoModelForCausalLM, ParallelismSizes, PipelineConfig, Stage

TITLE = "A pipeline's step, against hand-written torch.distributed.pipelining"


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
    model: LlamaConfig = attrs.field(factory=llama)

    @property
    def batches(self) -> Iterator[Batch]:
        """The batches of this data-parallel rank, the same on all its pipeline ranks."""
        return batches(self.count * self.size, self.length, dist.get_rank() % (self.world // self.pp))


CASES = (
    Case(schedule="1F1B"),
    Case(schedule="Interleaved1F1B"),
    Case(schedule="ZBVZeroBubble"),
    Case(schedule="1F1B", strategy="fsdp2", world=4, count=4),  # two shards of every stage
)


def measure() -> Iterator[Figure]:
    """Yield wall and CPU time of a step for each schedule, in milliseconds."""
    for case in CASES:
        ours, peer = on_ranks(case.world, compare, case)[0]
        shards = f", {case.strategy}" if case.strategy != "none" else ""
        what = f"{case.schedule} step, pp {case.pp}{shards}, {case.world} ranks"
        yield from figures(what, ours, peer, "hand-written pipelining", LIMIT)


def compare(case: Case) -> list[list[Times]]:
    """Run on every rank: take steps of both in turn and return the wall and CPU times of each."""
    return in_turn([of_runtime(*pipeline(case)), _peer(case)], case.batches, alike=2)


@attrs.frozen(eq=False)
class Nothing:
    """A strategy for one data-parallel rank that does nothing, as the hand-written side does without shards."""

    name, stage = "nothing", Stage.DATA
    config_type: ClassVar[type] = type(None)
    axes, composes_with = frozenset({"dp_shard", "dp_replicate"}), frozenset({"pp"})
    config: object = None


def pipeline(case: Case) -> tuple[DistributedSetup, Any]:
    """Return the setup of *case* and its model, with the weights of seed 0."""
    torch.manual_seed(0)
    setup = DistributedSetup.build(
        strategy=FSDP2Config(mp_policy=FP32) if case.strategy == "fsdp2" else Nothing(),
        parallelism_sizes=ParallelismSizes(pp_size=case.pp),
        pipeline_config=PipelineConfig(pp_schedule=case.schedule, pp_microbatch_size=case.size),
    )
    return setup, NeMoAutoModelForCausalLM.from_config(case.model, distributed_setup=setup).train()


def _peer(case: Case) -> Step:
    _, divided = pipeline(case)  # only for its division
    info, shards = divided.info, case.world // case.pp
    torch.manual_seed(0)
    whole = LlamaForCausalLM(case.model).train()
    mesh = init_device_mesh("cpu", (case.pp, shards), mesh_dim_names=("pp", "dp"))
    parts = [
        LlamaStage(
            whole,
            [int(name.rsplit(".", 1)[1]) for name in stage.modules if ".layers." in name],
            stage.is_first,
            stage.is_last,
        )
        for stage in info.stages
    ]
    if shards > 1:
        policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
        parts = [shard_stage(part, mesh["dp"], mp_policy=policy) for part in parts]
    group = mesh["pp"].get_group()
    built = [
        PipelineStage(part, stage.index, stage.count, torch.device("cpu"), group=group)
        for part, stage in zip(parts, info.stages, strict=True)
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

    def step(batch: Batch) -> float:
        count.copy_((batch["labels"][:, 1:] != -100).sum())
        if shards > 1:
            dist.all_reduce(count, group=mesh["dp"].get_group())
        losses: list[Tensor] = []
        inputs = (batch["input_ids"],) if info.has_first_stage else ()
        target = batch["labels"] if info.has_last_stage else None
        schedule.step(*inputs, target=target, losses=losses, return_outputs=False)
        total = torch.stack(losses).sum() / shards if losses else torch.zeros(())
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
