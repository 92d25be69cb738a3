"""Step time of a mixture of experts against transformers' own expert parallelism, in turn in the same processes.

Both shard the experts over ``ep`` ranks and the rest with FSDP2, dispatch tokens with the same all-to-all and run the
same grouped matmul. The peer is distributed by ``DistributedConfig(ep_size=, fsdp_size=)``; around it stands what a
careful person adds: token counts summed over the ranks, the loss weighted by them, the norm over both meshes, and the
global loss reported. It has no exact router loss (the mean over ranks of a balance is not that of all tokens), so the
router loss is off in the comparison, and what turning it on costs ours is a line of its own.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.distributed as dist
from bench_step import _batches, _enough
from figures import Figure
from ranks import on_ranks
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.distributed import DistributedConfig

from nemo_dist import DistributedSetup, FSDP2Config, NeMoAutoModelForCausalLM, ParallelismSizes

TITLE = "A training step of a mixture of experts, against transformers' own expert parallelism"
LIMIT = 1.03
_WARM_UP = 3
_SECONDS = 60
_FP32 = {"param_dtype": "float32", "reduce_dtype": "float32"}
_Times = tuple[float, float]  # wall and CPU, milliseconds
_Step = Callable[[dict[str, Tensor]], float]


@attrs.frozen(kw_only=True)
class Case:
    """``ep`` of ``world`` ranks share the experts; each rank sees ``rows`` sequences of ``length`` tokens in a step."""

    world: int
    ep: int
    rows: int = 4
    length: int = 128


CASES = (Case(world=2, ep=2), Case(world=4, ep=2, rows=2))


def measure() -> Iterator[Figure]:
    """Yield wall and CPU time of a step for each topology, in milliseconds."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        Qwen3MoeForCausalLM(_config()).save_pretrained(folder)
        for case in CASES:
            samples = on_ranks(case.world, compare, case, Path(folder))[0]
            where = f"{case.world} ranks, ep {case.ep}"
            for clock, what in enumerate(("", ", CPU time")):
                plain, peer, balanced = ([times[clock] for times in taken] for taken in samples)
                against = "transformers' DistributedConfig"
                yield Figure(what=f"{where}{what}", unit="ms", ours=plain, peer=peer, against=against, limit=LIMIT)
                yield Figure(
                    what=f"{where}, router loss{what}", unit="ms", ours=balanced, peer=plain, against="ours without it"
                )


def compare(case: Case, folder: Path) -> tuple[list[_Times], ...]:
    """Run on every rank: take steps of ours, the peer, and ours with the router loss in turn; return the times."""
    batches: Any = _batches(case)  # type: ignore[arg-type]
    ours = _ours(case, folder)
    steps = (lambda batch: ours({**batch, "output_router_logits": False}), _peer(case, folder), ours)
    taken: tuple[list[_Times], ...] = ([], [], [])
    deadline = time.monotonic() + _SECONDS
    while not _enough(len(taken[0]), deadline):
        batch = next(batches)
        losses = [0.0, 0.0, 0.0]
        # Who goes first changes every time: the second finds warmer caches.
        for which in (0, 1, 2) if len(taken[0]) % 2 == 0 else (1, 0, 2):
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            losses[which] = steps[which](batch)
            taken[which].append((1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)))
        if len(taken[0]) == 1 and abs(losses[0] - losses[1]) > 1e-4 * abs(losses[1]):
            raise RuntimeError(f"both start from the same model and data, but the losses are {losses[:2]}")
    return tuple(times[_WARM_UP:] for times in taken)


def _config() -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=256,
        moe_intermediate_size=192,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        output_router_logits=True,
        use_cache=False,
    )


def _ours(case: Case, folder: Path) -> _Step:
    setup = DistributedSetup.build(
        strategy=FSDP2Config(mp_policy=_FP32), parallelism_sizes=ParallelismSizes(ep_size=case.ep)
    )
    model = NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32).train()
    runtime = setup.runtime(model)
    optimizer = runtime.optimizer(torch.optim.AdamW, lr=1e-4)

    def step(batch: dict[str, Tensor]) -> float:
        loss = runtime.forward_backward(batch)
        runtime.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def _peer(case: Case, folder: Path) -> _Step:
    # from_pretrained(distributed_config=) asks for accelerate, to load weights; these are the two calls it makes.
    config, _, manager = Qwen3MoeForCausalLM.prepare_distribute_model(
        DistributedConfig(ep_size=case.ep, fsdp_size=case.world)
    )
    whole = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32, output_router_logits=False).train()
    model = Qwen3MoeForCausalLM.maybe_distribute_model(whole, config, manager)
    meshes: dict[Any, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        meshes.setdefault(parameter.device_mesh, []).append(parameter)
    optimizer = torch.optim.AdamW([{"params": group} for group in meshes.values()], lr=1e-4)
    ranks = dist.get_world_size()

    def step(batch: dict[str, Tensor]) -> float:
        count = (batch["labels"][:, 1:] != -100).sum().float()
        total = count.clone()
        dist.all_reduce(total)
        loss = model(**batch).loss * (count / total * ranks)  # the gradients are averaged over the ranks
        loss.backward()
        norms = [nn.utils.get_total_norm([p.grad for p in group]).full_tensor() for group in meshes.values()]
        for group in meshes.values():
            nn.utils.clip_grads_with_norm_(group, 1.0, torch.stack(norms).norm())
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / ranks
        dist.all_reduce(mean)
        return float(mean)

    return step
