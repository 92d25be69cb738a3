"""What ``explain`` says that experts send is what they send."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_dist import DistributedSetup, FSDP2Config, ParallelismSizes, initialize_distributed
from nemo_dist.testing.zoo import SPECIMENS
from nemo_dist.traffic import ModelFacts, readable

ROWS, LENGTH = 2, 16
FP32 = FSDP2Config(mp_policy={"param_dtype": "float32", "reduce_dtype": "float32", "output_dtype": "float32"})


class Sent(TorchDispatchMode):
    """Add up what this rank gives away in gathers, scatters and exchanges, as if an exchange were even."""

    def __init__(self, ep):
        super().__init__()
        self.ep = ep
        self.sent = {"all-gather": 0, "reduce-scatter": 0, "all-to-all": 0}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if name.startswith("c10d._allgather_base_"):
            self.sent["all-gather"] += args[0].nbytes - args[1].nbytes
        elif name.startswith("c10d._reduce_scatter_base_"):
            self.sent["reduce-scatter"] += args[1].nbytes - args[0].nbytes
        elif name.startswith("_c10d_functional.all_gather_into_tensor"):
            self.sent["all-gather"] += args[0].nbytes * (args[1] - 1)
        elif name.startswith("_c10d_functional.all_to_all_single"):
            self.sent["all-to-all"] += args[0].nbytes * (self.ep - 1) / self.ep
        elif name.startswith("c10d.alltoall_base_"):
            self.sent["all-to-all"] += args[1].nbytes * (self.ep - 1) / self.ep
        return function(*args, **(kwargs or {}))


def measured(specimen, sizes, recompute):
    """Return the bytes that a step sends by kind of collective, and those that the plugins say it will."""
    initialize_distributed("gloo")
    setup = DistributedSetup.build(
        strategy=FP32, parallelism_sizes=ParallelismSizes(**sizes), activation_checkpointing=recompute
    )
    config = SPECIMENS[specimen].config()
    config.output_router_logits = False
    with torch.device("meta"):
        whole = SPECIMENS[specimen].load.from_config(config)
    model = SPECIMENS[specimen].load.from_config(config, distributed_setup=setup, dtype=torch.float32)
    runtime = setup.runtime(model)
    batch = SPECIMENS[specimen].batch(ROWS, LENGTH, torch.Generator().manual_seed(0))
    with Sent(setup.plan.size("ep")) as counter:
        runtime.forward_backward(batch)
    facts = ModelFacts.of(whole, ROWS, LENGTH, setup.strategy.compute_dtype, bool(recompute))
    said = dict.fromkeys(counter.sent, 0)
    for found in setup.calls.traffic(plan=setup.plan, facts=facts):
        for entry in found:
            if entry.collective in said:
                said[entry.collective] += entry.sent
    return counter.sent, said


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
    results = on_ranks(world, measured, specimen, sizes, recompute)
    # Tensor parallelism gathers a little of its own.
    for kind in ("reduce-scatter", "all-to-all", *(() if "tp_size" in sizes else ("all-gather",))):
        sent, said = (sum(result[which][kind] for result in results) for which in (0, 1))
        assert said == pytest.approx(sent, rel=0.01), (kind, results)  # FSDP2 pads to equal shards


def test_explain_says_how_many_experts_a_rank_holds_and_what_a_layer_sends():
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


def test_adding_up_sends_no_tokens():
    sizes = ParallelismSizes(ep_size=2, tp_size=2)
    setup = DistributedSetup.build(
        parallelism_sizes=sizes, moe_parallel_config={"dispatcher": "all_reduce"}, world_size=4
    )
    assert "ep           all-reduce of tokens, once in the forward of every layer" in setup.explain()
    assert "all-to-all" not in setup.explain()
