"""What ``explain`` says that experts send is what they send."""

import pytest
import torch
from sent_bytes import on_rank_measure_bytes

from nemo_dist import DistributedSetup, FSDP2Config, ParallelismSizes
from nemo_dist.plugin.comm_estimate import readable
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.tiny_models import SPECIMENS

CASES = {
    "2": (2, "qwen3-moe", {"ep_size": 2}, False),
    "shards": (4, "qwen2-moe", {"ep_size": 2}, False),
    "recompute": (2, "qwen3-moe", {"ep_size": 2}, True),
    "dense-first": (4, "deepseek-v3", {"ep_size": 4}, False),
    "tp": (4, "qwen3-moe", {"ep_size": 4, "tp_size": 2}, False),
    "replicas": (4, "qwen3-moe", {"ep_size": 2, "dp_replicate_size": 2}, False),
}


@pytest.mark.parametrize(
    "case", [c if c in ("2", "shards", "tp") else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
def test_a_step_with_experts_sends_what_explain_says(on_ranks, case):
    """Ranks send as many tokens as they have, but get what routers choose: the sum over ranks is known, no rank's."""
    world, specimen, sizes, recompute = CASES[case]
    options = {
        "strategy": FSDP2Config(mp_policy=FP32),
        "parallelism_sizes": ParallelismSizes(**sizes),
        "activation_checkpointing": recompute,
    }
    results = on_ranks(world, on_rank_measure_bytes, specimen, options)
    for kind in ("all-gather", "reduce-scatter", "all-to-all"):
        sent, said = (sum(result[which][kind] for result in results) for which in (0, 1))
        # FSDP2 pads to equal shards, and counts norms and routers as if tensor parallelism divided them.
        close = 0.1 if "tp_size" in sizes and kind != "all-to-all" else 0.01
        assert said == pytest.approx(sent, rel=close), (kind, results)


def test_explain_shows_experts_per_rank_and_bytes_per_layer():
    setup = DistributedSetup.build(parallelism_sizes=ParallelismSizes(ep_size=4, dp_replicate_size=2), world_size=16)
    with torch.device("meta"):
        model = SPECIMENS["qwen3-moe"].load.from_config(SPECIMENS["qwen3-moe"].config())
    plain, known = setup.explain(), setup.explain(model, rows=2, length=64)

    for text in (plain, known):
        assert "moe: 1/4 of the experts on each rank of ep, in 4 shards; dispatcher auto" in text
        assert "ep           all-to-all of tokens, twice in the forward of every layer with experts, twice in" in text
        assert "ep_shard     all-reduce of gradient shards of experts, once, between replicas" in text
    # Two tokens for an expert each, 32 wide in bfloat16, of which three quarters leave; there, back, and both backward.
    layer = 4 * 2 * 64 * 2 * 32 * 2 * 3 // 4
    assert f"of 2 experts a rank, {readable(layer)} a layer: {readable(3 * layer)}" in known
    assert "B a layer" not in plain


def test_the_all_reduce_dispatcher_sends_no_tokens():
    sizes = ParallelismSizes(ep_size=2, tp_size=2)
    setup = DistributedSetup.build(
        parallelism_sizes=sizes, moe_parallel_config={"dispatcher": "all_reduce"}, world_size=4
    )
    assert "ep           all-reduce of tokens, once in the forward of every layer" in setup.explain()
    assert "all-to-all" not in setup.explain()
