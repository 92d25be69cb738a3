"""Step time of a mixture of experts against transformers' own expert parallelism, in turn in the same processes.

Both shard the experts over ``ep`` ranks and the rest with FSDP2, dispatch tokens with the same all-to-all and run the
same grouped matmul. The peer is distributed by ``DistributedConfig(ep_size=, fsdp_size=)``; around it stands what a
careful person adds: token counts summed over the ranks, the loss weighted by them, the norm over both meshes, and the
global loss reported. It has no exact router loss (the mean over ranks of a balance is not that of all tokens), so the
router loss is off in the comparison, and what turning it on costs ours is a line of its own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import attrs
import torch
import torch.distributed as dist
from figures import Figure
from native import distributed
from ranks import on_ranks
from steps import FP32, LIMIT, VOCABULARY, Step, Times, batches, by_hand, figures, in_turn, of_runtime
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from nemo_dist import DistributedSetup, FSDP2Config, NeMoAutoModelForCausalLM, ParallelismSizes

TITLE = "A training step of a mixture of experts, against transformers' own expert parallelism"


@attrs.frozen(kw_only=True)
class Case:
    """``ep`` of ``world`` ranks share the experts; each rank sees ``rows`` sequences of ``length`` tokens in a step."""

    world: int
    ep: int
    rows: int = 4
    length: int = 128


CASES = (Case(world=2, ep=2), Case(world=4, ep=2, rows=2))


def measure() -> Iterator[Figure]:
    """Yield wall and CPU time of a step for each topology."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        Qwen3MoeForCausalLM(_config()).save_pretrained(folder)
        for case in CASES:
            plain, peer, balanced = on_ranks(case.world, compare, case, Path(folder))[0]
            where = f"{case.world} ranks, ep {case.ep}"
            yield from figures(where, plain, peer, "transformers' DistributedConfig", LIMIT)
            yield from figures(f"{where}, router loss", balanced, plain, "ours without it")


def compare(case: Case, folder: Path) -> list[list[Times]]:
    """Run on every rank: take steps of ours, the peer, and ours with the router loss in turn; return the times."""
    balanced, plain = _ours(case, folder), _ours(case, folder)
    steps = (lambda batch: plain({**batch, "output_router_logits": False}), _peer(case, folder), balanced)
    return in_turn(steps, batches(case.rows, case.length, dist.get_rank()), alike=2)


def _config() -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=VOCABULARY,
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


def _ours(case: Case, folder: Path) -> Step:
    setup = DistributedSetup.build(
        strategy=FSDP2Config(mp_policy=FP32), parallelism_sizes=ParallelismSizes(ep_size=case.ep)
    )
    model = NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32).train()
    return of_runtime(setup, model)


def _peer(case: Case, folder: Path) -> Step:
    whole = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32, output_router_logits=False).train()
    model = distributed(whole, ep_size=case.ep, fsdp_size=case.world)
    return by_hand(model, lambda batch: model(**batch).loss, ranks=case.world)
