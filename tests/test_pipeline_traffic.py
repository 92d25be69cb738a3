"""What ``explain`` says that pipeline ranks send to each other is what they send."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_dist import DistributedSetup, FSDP2Config, ParallelismSizes, PipelineConfig
from nemo_dist.plugin.comm_estimate import ModelFacts, readable
from nemo_dist.testing.tiny_models import SPECIMENS

ROWS, LENGTH, WIDTH, VOCABULARY = 4, 16, 32, 96
BORDER = ROWS * LENGTH * WIDTH * 4  # the float32 hidden states of all rows
HEAD = VOCABULARY * WIDTH * 4
UP = "round_virtual_stages_to_pp_multiple"
# World, model, sizes, other options; then of every pipeline rank how many borders it sends over, forward and back, the
# bytes over one border, and those of a tied gradient.
CASES = {
    "1f1b": (2, "llama-deep", {}, {}, [(1, 0), (0, 1)], BORDER, 0),
    "bfloat16": (2, "llama-deep", {}, {"compute": "bfloat16"}, [(1, 0), (0, 1)], BORDER // 2, 0),
    "asked": (2, "llama-deep", {}, {"compute": "bfloat16", "dtype": "float32"}, [(1, 0), (0, 1)], BORDER, 0),
    "looped": (2, "llama-deep", {}, {"pp_schedule": "interleaved_1f1b"}, [(2, 1), (1, 2)], BORDER, 0),
    "six": (
        2,
        "llama-deep",
        {},
        {"pp_schedule": "looped_bfs", "layers_per_stage": 2, UP: "up"},
        [(3, 2), (2, 3)],
        BORDER,
        0,
    ),
    "v": (2, "llama-deep-tied", {}, {"pp_schedule": "zbv"}, [(1, 1), (1, 1)], BORDER, 0),
    "tied": (2, "llama-deep-tied", {}, {}, [(1, 0), (0, 1)], BORDER, HEAD),
    "filled": (
        2,
        "llama-deep",
        {},
        {"pp_batch_size": 6, "pp_microbatch_size": 2},
        [(1, 0), (0, 1)],
        BORDER * 6 // 4,
        0,
    ),
    "four": (4, "llama-deep", {"pp_size": 4}, {}, [(1, 0), (1, 1), (1, 1), (0, 1)], BORDER, 0),
    "tp": (4, "llama-deep-tied", {"tp_size": 2}, {}, [(1, 0), (0, 1)], BORDER, HEAD // 2),
    "cp": (4, "llama-deep", {"cp_size": 2}, {}, [(1, 0), (0, 1)], BORDER // 2, 0),
    "shards": (4, "llama-deep-tied", {}, {}, [(1, 0), (0, 1)], BORDER, HEAD // 2),
}


def build(sizes, options, world=None):
    options = dict(options)
    policy = {"param_dtype": options.pop("compute", "float32"), "reduce_dtype": "float32"}
    sizes = ParallelismSizes(**{"pp_size": 2, **sizes})
    return DistributedSetup.build(FSDP2Config(mp_policy=policy), sizes, PipelineConfig(**options), world_size=world)


class Sent(TorchDispatchMode):
    """Add up the bytes that this rank sends to single other ranks."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function).startswith("c10d.send"):
            self.bytes += sum(tensor.nbytes for tensor in args[0])
        return function(*args, **(kwargs or {}))


def on_rank_send(specimen, sizes, options, frozen=()):
    setup = build(sizes, options)
    config = SPECIMENS[specimen].config()
    pipeline = SPECIMENS[specimen].load.from_config(config, distributed_setup=setup, dtype=torch.float32)
    freeze(pipeline.parts, frozen)
    runtime = setup.runtime(pipeline)
    batch = SPECIMENS[specimen].batch(ROWS, LENGTH, torch.Generator().manual_seed(0))
    runtime.forward_backward(batch)  # before its first step a schedule greets its neighbours with a number
    with Sent() as counter:
        runtime.forward_backward(batch)
    return pipeline.info.pp_rank, counter.bytes


def freeze(parts, names):
    for part in parts:
        for name, parameter in part.named_parameters():
            parameter.requires_grad_(not name.startswith(tuple(names)))


@pytest.mark.parametrize("case", ["tied", "1f1b"])
def test_pipeline_ranks_with_frozen_parameters_send_what_explain_says(ranks, case):
    """Gradients of hidden states are sent to a stage that is frozen too, and so is the sum of a frozen tied one."""
    world, specimen, sizes, options, *_, tied = CASES[case]
    frozen = ("model.embed_tokens", "lm_head", "model.layers") if tied else ("model",)
    setup = build(sizes, options, world)
    with torch.device("meta"):
        model = SPECIMENS[specimen].load.from_config(SPECIMENS[specimen].config(), dtype=torch.float32)
    freeze([model], frozen)
    facts = ModelFacts.of(model, ROWS, LENGTH, setup.strategy.compute_dtype, recomputes=False)
    said = [entry for found in setup.calls.traffic(plan=setup.plan, facts=facts, model=model) for entry in found]
    sums = [entry.sent for entry in said if entry.axis == "pp"]
    sent = [count for _, count in ranks(world).run(on_rank_send, specimen, sizes, options, frozen)]
    assert sent == [sums[0] + sum(sums[2:]), sums[1] + sum(sums[2:])]


@pytest.mark.parametrize("case", CASES)
def test_pipeline_ranks_send_what_explain_says(ranks, case):
    world, specimen, sizes, options, borders, bytes_over_one, tied = CASES[case]
    setup = build(sizes, options, world)
    with torch.device("meta"):
        model = SPECIMENS[specimen].load.from_config(SPECIMENS[specimen].config(), dtype=torch.float32)
    facts = ModelFacts.of(model, ROWS, LENGTH, setup.strategy.compute_dtype, recomputes=False)
    said = [entry for found in setup.calls.traffic(plan=setup.plan, facts=facts, model=model) for entry in found]

    most = [max(crossed) * bytes_over_one for crossed in zip(*borders, strict=True)]
    assert [entry.sent for entry in said if entry.axis == "pp"] == [*most, tied][: 3 if tied else 2]
    for place, count in ranks(world).run(on_rank_send, specimen, sizes, options):
        swapped = tied if place in (0, len(borders) - 1) else 0
        assert count == sum(borders[place]) * bytes_over_one + swapped


def test_explain_lists_what_travels_between_stages():
    setup = build({"pp_size": 4}, {}, world=8)
    with torch.device("meta"):
        model = SPECIMENS["llama-deep"].load.from_config(SPECIMENS["llama-deep"].config())
    known = setup.explain(model, rows=4, length=64)

    assert f"pp           send of hidden states to the next stage, of every microbatch: {readable(4 * BORDER)}" in known
    assert "pp           send of their gradients to the stage before, of every microbatch" in setup.explain()
