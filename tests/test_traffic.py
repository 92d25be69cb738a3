"""What ``explain`` says that a step sends is what a step sends."""

from typing import ClassVar

import attrs
import pytest
import torch
from cases import case_id, cases, slow
from sent_bytes import LENGTH, ROWS, Reduced, on_rank_measure_bytes

from nemo_dist import (
    ContextConfig,
    DDPConfig,
    DistributedSetup,
    FSDP2Config,
    ParallelismSizes,
    Role,
    Stage,
    initialize_distributed,
)
from nemo_dist.plugin.comm_estimate import ModelFacts, readable
from nemo_dist.plugin.protocol import declared
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.tiny_models import SPECIMENS

CASES = {
    "fsdp2": (2, "llama", {}),
    "bfloat16": (2, "llama", {"strategy": FSDP2Config()}),
    "tied": (2, "llama-tied", {}),
    "kept": (2, "llama", {"strategy": FSDP2Config(mp_policy=FP32, reshard_after_forward=False)}),
    "cp": (2, "qwen3", {"parallelism_sizes": ParallelismSizes(cp_size=2)}),
    "cp-recomputed": (2, "qwen3", {"parallelism_sizes": ParallelismSizes(cp_size=2), "activation_checkpointing": True}),
    "ulysses": (
        4,
        "llama",
        {"parallelism_sizes": ParallelismSizes(cp_size=4), "plugins": (ContextConfig(method="ulysses"),)},
    ),
    "ring": (
        2,
        "llama",
        {"parallelism_sizes": ParallelismSizes(cp_size=2), "plugins": (ContextConfig(method="ring"),)},
    ),
    "tp": (2, "llama", {"parallelism_sizes": ParallelismSizes(tp_size=2)}),
    "tp-odd": (2, "llama-odd", {"parallelism_sizes": ParallelismSizes(tp_size=2)}),
    "sp": (
        2,
        "llama",
        {
            "strategy": FSDP2Config(mp_policy=FP32, sequence_parallel=True),
            "parallelism_sizes": ParallelismSizes(tp_size=2),
            "activation_checkpointing": True,
        },
    ),
    "dp-cp": (4, "llama", {"parallelism_sizes": ParallelismSizes(cp_size=2)}),
}


# What a block is made of: q/k norms, joined outputs, norms after attention and feed-forward, experts.
KINDS = [
    (specimen, sequence, mode)
    for specimen in ("qwen3", "phi3", "gemma3", "mixtral")
    for sequence in (False, True)
    for mode in (False, True, "selective")
]


@pytest.mark.slow
@cases(
    ("specimen", "sequence", "mode"),
    KINDS,
    lambda specimen, sequence, mode: case_id(specimen, sequence and "sequence", mode and f"recompute {mode}"),
)
def test_tensor_parallel_traffic_of_every_model_is_what_explain_says(on_ranks, specimen, sequence, mode):
    options = {
        "strategy": FSDP2Config(mp_policy=FP32, sequence_parallel=sequence),
        "parallelism_sizes": ParallelismSizes(tp_size=2),
        "activation_checkpointing": mode,
    }
    for sent, said in on_ranks(2, on_rank_measure_bytes, specimen, options):
        assert said == sent


@pytest.mark.parametrize("case", CASES)
def test_a_step_sends_what_explain_says(on_ranks, case):
    world, specimen, options = CASES[case]
    options = {"strategy": FSDP2Config(mp_policy=FP32), **options}
    for sent, said in on_ranks(world, on_rank_measure_bytes, specimen, options):
        for kind, count in sent.items():
            assert said[kind] == pytest.approx(count, rel=0.01), (kind, sent, said)  # FSDP2 pads to equal shards


@attrs.frozen(eq=False)
class Islands:
    """A third party's plugin with an axis whose ranks read different batches."""

    name: ClassVar[str] = "islands"
    config_type: ClassVar[type] = dict
    stage: ClassVar[int] = Stage.CONTEXT + 1
    axes: ClassVar[frozenset[str]] = frozenset({"islands"})
    composes_with: ClassVar[frozenset[str]] = frozenset({"ddp", "fsdp2"})
    roles: ClassVar = {"islands": Role.BATCH}
    config: dict = attrs.field(factory=dict)


class Slices(Islands):
    """The same, with an axis whose ranks read different parts of the same sequences."""

    name: ClassVar[str] = "slices"
    axes: ClassVar[frozenset[str]] = frozenset({"slices"})
    roles: ClassVar = {"slices": Role.SEQUENCE}


def on_rank_reduce(specimen, options, batches):
    """Return the bytes that a step sends in all-reduces of gradients, and what the strategy says it will."""
    initialize_distributed("gloo")
    setup = DistributedSetup.build(**options)
    config = SPECIMENS[specimen].config()
    with torch.device("meta"):
        whole = SPECIMENS[specimen].load.from_config(config, dtype=torch.float32)
    model = SPECIMENS[specimen].load.from_config(config, distributed_setup=setup, dtype=torch.float32)
    runtime = setup.runtime(model)
    batch = SPECIMENS[specimen].batch(ROWS, LENGTH, torch.Generator().manual_seed(0))
    with Reduced() as counter:
        runtime.forward_backward([batch] * batches)
    facts = ModelFacts.of(whole, ROWS * batches, LENGTH, declared(setup.strategy, "compute_dtype"), False)
    facts = attrs.evolve(facts, batches=batches)
    said = setup.strategy.traffic(plan=setup.plan, facts=facts)
    return counter.bytes, sum(entry.sent for entry in said if entry.collective == "all-reduce")


TWO_REPLICAS = ParallelismSizes(dp_replicate_size=2)


def vars_of(sizes):
    return {"dp_replicate": sizes.dp_replicate_size, "tp": sizes.tp_size, **sizes.extra}


ISLANDS = {"parallelism_sizes": ParallelismSizes(extra={"islands": 2}), "plugins": (Islands(),)}


@cases(
    ("world", "options", "batches"),
    [
        (2, ISLANDS, 1),
        (2, {**ISLANDS, "strategy": FSDP2Config(mp_policy=FP32, defer_fsdp_grad_sync=False)}, 2),
        slow(4, ISLANDS, 2),
        slow(4, {"parallelism_sizes": TWO_REPLICAS}, 2),
        slow(4, {"parallelism_sizes": ParallelismSizes(dp_replicate_size=2, tp_size=2)}, 1),
        (2, {"strategy": DDPConfig()}, 2),
        slow(2, {"strategy": DDPConfig(), **ISLANDS}, 1),
    ],
    lambda world, options, batches: case_id(
        world,
        getattr(options.get("strategy"), "plugin", "fsdp2"),
        options.get("parallelism_sizes") and vars_of(options["parallelism_sizes"]),
        f"{batches} batches",
    ),
)
def test_replicas_of_a_shard_reduce_what_the_strategy_says(on_ranks, world, options, batches):
    """Where no rank has another shard, too: replicas and nothing else, or beside tensor parallelism."""
    options = {"strategy": FSDP2Config(mp_policy=FP32), **options}
    tp = options.get("parallelism_sizes", TWO_REPLICAS).tp_size
    for sent, said in on_ranks(world, on_rank_reduce, "llama", options, batches):
        # FSDP2 pads to equal shards, and norms are counted as if tensor parallelism divided them.
        assert sent > 0 and said == pytest.approx(sent, rel=0.1 if tp > 1 else 0.02)


@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
def test_axes_of_other_plugins_that_split_the_batch_are_replicas(strategy):
    sizes = ParallelismSizes(extra={"islands": 4})
    text = DistributedSetup.build(strategy, sizes, plugins=(Islands(),), world_size=4).explain()
    assert "4 replicas" in text
    words = {"fsdp2": "replicas     all-reduce of gradient shards", "ddp": "dp           all-reduce of gradients"}
    assert words[strategy] in text


def test_ddp_averages_over_axes_of_other_plugins_that_split_sequences():
    """Its ranks are all those that see different tokens."""
    sizes = ParallelismSizes(extra={"slices": 4})
    text = DistributedSetup.build("ddp", sizes, plugins=(Slices(),), world_size=8).explain()
    assert "ddp: 8 replicas" in text and "dp_cp        all-reduce of gradients, by bucket" in text


def test_explain_lists_the_collectives_of_every_axis_and_their_bytes():
    sizes = ParallelismSizes(cp_size=2, dp_replicate_size=2)
    setup = DistributedSetup.build(parallelism_sizes=sizes, world_size=8)
    with torch.device("meta"):
        model = SPECIMENS["llama"].load.from_config(SPECIMENS["llama"].config())
    plain, known = setup.explain(), setup.explain(model, rows=4, length=4096)
    for text in (plain, known):
        for words in (
            "dp_shard_cp  all-gather of parameters, by block, once, and again in the backward",
            "dp_shard_cp  reduce-scatter of gradients, by block, once",
            "dp_replicate all-reduce of gradient shards, once",
            "cp           all-gather of keys and values, in the forward of every block",
            "cp           reduce-scatter of gradients of keys and values, in its backward",
        ):
            assert words in text
    assert "gathered one by one: 3 LlamaDecoderLayer, 1 Embedding" in known
    count = sum(parameter.numel() for parameter in model.parameters())
    assert f"holds whole gradients until the last one is done, up to {readable(4 * count)} on a rank" in known
    assert "in every LlamaAttention" in known
    assert "KiB" not in plain and "MiB" not in plain
    # 3 blocks of 2 key heads of width 8 in bfloat16, for 4 x 4096 tokens, half of which the other rank has
    assert f"in its backward: {readable(3 * 2 * 2 * 8 * 2 * 4 * 4096 // 2)}" in known


def test_explain_lists_the_modules_that_tensor_parallelism_cuts():
    setup = DistributedSetup.build(FSDP2Config(sequence_parallel=True), ParallelismSizes(tp_size=2), world_size=4)
    with torch.device("meta"):
        model = SPECIMENS["llama"].load.from_config(SPECIMENS["llama"].config())
    plain, known = setup.explain(), setup.explain(model, rows=4, length=4096)
    for text in (plain, known):
        assert "tp           reduce-scatter of their outputs, in the forward" in text
    assert (
        "colwise: model.layers.*.self_attn.{q_proj, k_proj, v_proj}, model.layers.*.mlp.{gate_proj, up_proj};" in known
    )
    assert "rowwise: model.layers.*.self_attn.o_proj, model.layers.*.mlp.down_proj;" in known
    # 2 regions in 3 blocks, and once after the last block: tokens x hidden size in bfloat16, half of it sent
    assert f"read, in the forward: {readable((2 * 3 + 1) * 4 * 4096 * 32 * 2 // 2)}" in known


def test_ddp_reduces_every_gradient_once():
    setup = DistributedSetup.build(strategy=DDPConfig(), world_size=4)
    with torch.device("meta"):
        model = SPECIMENS["llama"].load.from_config(SPECIMENS["llama"].config(), dtype=torch.float32)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert f"all-reduce of gradients, by bucket, once: {readable(count * 4 * 2 * 3 // 4)}" in setup.explain(model)


def test_one_rank_sends_nothing():
    assert "collectives" not in DistributedSetup.build(world_size=1).explain()
