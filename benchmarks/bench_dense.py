"""Step time of tensor, sequence and context parallelism, against hand-written torch and transformers' own.

The hand-written side is what torch's tutorials and torchtitan do: ``parallelize_module`` with DTensor styles and
``loss_parallel`` for the tp axis, an attention function that gathers keys and values for the cp axis, ``fully_shard``
per block around either. transformers' side is ``DistributedConfig(tp_size=..., fsdp_size=...)``, which joins the logits
on every rank. All train the same float32 Llama on the same batches, step by step in turn in the same processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import attrs
import torch
from figures import Figure
from handwritten import cut, llama, next_token_loss, own_part, part_loss, shard, share_attention
from native import distributed
from ranks import on_ranks
from steps import FP32, LIMIT, Batch, Step, Times, batches, by_hand, figures, in_turn, of_runtime
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import loss_parallel
from transformers import LlamaForCausalLM

from nemo_dist import DistributedSetup, FSDP2Config, NeMoAutoModelForCausalLM, ParallelismSizes

TITLE = "A training step with tensor, sequence and context parallelism"


@attrs.frozen(kw_only=True)
class Case:
    """Axis sizes; each data-parallel rank sees ``rows`` sequences of ``length`` tokens in a step."""

    dp: int = 1
    cp: int = 1
    tp: int = 1
    sequence: bool = False
    rows: int = 4
    length: int = 256

    @property
    def name(self) -> str:
        """Return the axes that there are."""
        sizes = [f"{axis} {size}" for axis, size in (("fsdp", self.dp), ("cp", self.cp), ("tp", self.tp)) if size > 1]
        return " x ".join(sizes) + (", sequence parallel" if self.sequence else "")


CASES = (Case(tp=2), Case(tp=2, sequence=True), Case(cp=2), Case(dp=2, tp=2, rows=2))


def measure() -> Iterator[Figure]:
    """Yield wall and CPU time of a step of each case against every peer."""
    for case in CASES:
        ours, hand, *own = on_ranks(case.dp * case.cp * case.tp, compare, case)[0]
        yield from figures(case.name, ours, hand, "hand-written torch", LIMIT)
        for native in own:
            yield from figures(case.name, ours, native, "transformers' DistributedConfig")


def compare(case: Case) -> list[list[Times]]:
    """Run on every rank: take steps of ours and of each peer in turn and return the times of each."""
    mesh = init_device_mesh("cpu", (case.dp, case.cp, case.tp), mesh_dim_names=("dp", "cp", "tp"))
    steps = [_ours(case), _by_hand(case, mesh)]
    if case.cp == 1 and not case.sequence:  # of which transformers has none
        steps.append(_native(case, mesh))
    return in_turn(steps, batches(case.rows, case.length, mesh["dp"].get_local_rank()), alike=len(steps))


def _ours(case: Case) -> Step:
    torch.manual_seed(0)
    setup = DistributedSetup.build(
        strategy=FSDP2Config(mp_policy=FP32, sequence_parallel=case.sequence),
        parallelism_sizes=ParallelismSizes(dp_size=case.dp, cp_size=case.cp, tp_size=case.tp),
    )
    return of_runtime(setup, NeMoAutoModelForCausalLM.from_config(llama(), distributed_setup=setup).train())


def _by_hand(case: Case, mesh: DeviceMesh) -> Step:
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama()).train()
    if case.cp > 1:
        return _context(shard(share_attention(model, mesh["cp"]), mesh["cp"]), case, mesh)
    cut(model, mesh["tp"], case.sequence)
    if case.dp > 1:
        shard(model, mesh["dp"])
    step = by_hand(model, lambda batch: next_token_loss(model, batch), mesh["dp"].get_group(), case.dp)

    def inside(batch: Batch) -> float:
        with loss_parallel():
            return step(batch)

    return inside


def _context(model: LlamaForCausalLM, case: Case, mesh: DeviceMesh) -> Step:
    rank = mesh["cp"].get_local_rank()
    mean_loss: Callable[[Batch], Tensor] = lambda part: part_loss(model, part)  # noqa: E731
    step = by_hand(model, mean_loss, mesh["cp"].get_group(), case.cp)
    return lambda batch: step(own_part(batch, rank, case.cp))


def _native(case: Case, mesh: DeviceMesh) -> Step:
    torch.manual_seed(0)
    sizes = {"tp_size": case.tp} | ({"fsdp_size": case.dp} if case.dp > 1 else {})
    model = distributed(LlamaForCausalLM(llama()).train(), **sizes)
    return by_hand(model, lambda batch: model(**batch).loss, mesh["dp"].get_group(), case.dp)
