"""What a search says of a rank is so: what it holds, to the byte or nearly, and what it sends within layers."""

from contextlib import nullcontext

import pytest
import torch
from cases import case_id, cases, slow
from saved_activations import Saved
from sent_bytes import Sent

from nemo_dist import (
    ContextConfig,
    DistributedSetup,
    FSDP2Config,
    ParallelismSizes,
    PipelineConfig,
    TopologyError,
    initialize_distributed,
)
from nemo_dist.mesh.dtensor import local
from nemo_dist.models.meta_model import meta_model
from nemo_dist.plugin.comm_estimate import ModelFacts
from nemo_dist.plugin.memory_estimate import RankShare
from nemo_dist.search.enumeration import Topology
from nemo_dist.search.estimate import Estimator
from nemo_dist.search.hardware import Hardware
from nemo_dist.search.model import SearchedModel
from nemo_dist.setup.rank_memory import divide
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.shrink import tiny
from nemo_dist.testing.tiny_models import SPECIMENS

ROWS, LENGTH = 1, 32  # of a data-parallel rank; one row, as what is made once for all rows is no small part here


def held(tensors):
    return sum(local(tensor).nbytes for tensor in tensors)


def on_rank_measure(specimen, options, rows):
    """Return the bytes of parameters, gradients, optimizer state and activations of this rank, and what it sends."""
    initialize_distributed("gloo")
    setup = DistributedSetup.build(**options)
    config = SPECIMENS[specimen].config()
    config.output_router_logits = False
    model = SPECIMENS[specimen].load.from_config(config, distributed_setup=setup, dtype=torch.float32)
    runtime = setup.runtime(model)
    optimizer = runtime.optimizer(torch.optim.AdamW, lr=1e-3)
    batch = SPECIMENS[specimen].batch(rows, LENGTH, torch.Generator().manual_seed(0))
    batch = {"input_ids": batch["input_ids"], "labels": batch["input_ids"].clone()}  # no padding, no masked labels
    saved = Saved(runtime.parts, batch)
    sent = Sent()
    with saved.counting(), sent:
        runtime.forward_backward(batch)
    parameters = [parameter for _, parameter in runtime.named_parameters()]
    gradients = held(parameter.grad for parameter in parameters if parameter.grad is not None)
    optimizer.step()
    state = held(
        value for found in optimizer.state.values() for value in found.values() if isinstance(value, torch.Tensor)
    )
    return {
        "parameters": held(parameters),
        "gradients": gradients,
        "optimizer state": state,
        "activations": saved.most,
        "sent": by_axis(sent.within, runtime.mesh),
    }


def by_axis(sent, mesh):
    """Return the bytes along the axes whose collectives are within layers."""
    groups = {axis: mesh.group(axis).group_name for axis in ("tp", "cp", "ep") if axis in mesh.wide()}
    return {axis: sent[name] for axis, name in groups.items()}


def estimated(specimen, options, world, rows):
    """Return the same as a search says it, for every pipeline rank."""
    setup = DistributedSetup.build(**options, world_size=world)
    config = SPECIMENS[specimen].config()
    config.output_router_logits = False
    topology = Topology.of(setup, options.get("plugins", ()))
    estimator = Estimator(
        model=SearchedModel(config),
        hardware=Hardware.named("cpu"),
        batch=rows * setup.plan.size("dp"),
        length=LENGTH,
        imbalance=1.0,
    )
    ranks = estimator.shares(topology, 1 if setup.plan.size("pp") > 1 else rows)
    found = estimator.profile_of(topology)
    return [
        rank.states | {"activations": kept(rank, found, estimator), "sent": dict(estimator.sent(rank, found))}
        for rank in ranks
    ]


def kept(rank, found, estimator):
    """Return the bytes that autograd keeps of *rank*: activations, and what the rank received of other stages."""
    received = sum(stage.alive for stage in rank.stages if not stage.first) * rank.rows * found.hidden
    return estimator.memory(rank, found)["activations"] + received


def assert_holds(measured, said):
    """Compare the bytes of a rank with those that a search says: activations within 5 %, all others exactly."""
    print(f"activations: counted {measured['activations']:,}, said {said['activations']:,}")
    assert said["activations"] == pytest.approx(measured["activations"], rel=0.05)
    assert measured | {"activations": 0} == said | {"activations": 0}


def case(sizes, mode=False, strategy=None, plugins=()):
    return {
        "strategy": strategy or FSDP2Config(mp_policy=FP32),
        "parallelism_sizes": ParallelismSizes(**sizes),
        "activation_checkpointing": mode,
        "plugins": plugins,
    }


def vars_of(options):
    sizes = options["parallelism_sizes"]
    return {name: getattr(sizes, name) for name in ("tp_size", "cp_size", "ep_size", "dp_replicate_size")}


SEQUENCE = FSDP2Config(mp_policy=FP32, sequence_parallel=True)
CASES = [
    (2, "llama", case({})),
    slow(2, "llama", case({}, True)),
    slow(2, "llama", case({}, "selective")),
    slow(2, "llama-tied", case({})),
    slow(2, "llama", case({"tp_size": 2})),
    slow(2, "llama", case({"tp_size": 2}, True)),
    slow(2, "llama", case({"tp_size": 2}, "selective")),
    slow(2, "llama-odd", case({"tp_size": 2})),
    slow(2, "llama", case({"tp_size": 2}, False, SEQUENCE)),
    slow(2, "qwen3", case({"cp_size": 2})),
    slow(2, "qwen3", case({"cp_size": 2}, True)),
    slow(2, "llama", case({"cp_size": 2}, False, None, (ContextConfig(method="ulysses"),))),
    slow(2, "gemma3", case({})),
    slow(2, "qwen3-moe", case({})),
    slow(2, "qwen3-moe", case({"tp_size": 2})),
    slow(4, "llama", case({"tp_size": 2})),
    slow(4, "llama", case({"dp_replicate_size": 2})),
    slow(2, "llama", case({}, False, "ddp")),
    (2, "qwen3-moe", case({"ep_size": 2})),
]


@cases(
    ("world", "specimen", "options"),
    CASES,
    lambda world, specimen, options: case_id(
        world,
        specimen,
        {n: s for n, s in vars_of(options).items() if s},
        options["activation_checkpointing"] and f"recomputed {options['activation_checkpointing']}",
    ),
)
def test_a_rank_holds_what_a_search_says(on_ranks, world, specimen, options):
    measured = on_ranks(world, on_rank_measure, specimen, options, ROWS)
    (said,) = estimated(specimen, options, world, ROWS)

    # Ranks may get other numbers of tokens for their experts; a search says what they have on average.
    fullest = max(measured, key=lambda states: states["parameters"])
    mean = round(sum(states["activations"] for states in measured) / world)
    sent = {axis: round(sum(states["sent"][axis] for states in measured) / world) for axis in fullest["sent"]}
    assert_holds(fullest | {"activations": mean, "sent": sent}, said)


@cases(
    ("specimen", "schedule"),
    [("llama-tied", "1F1B"), slow("llama", "1F1B"), slow("llama", "GPipe")],
    lambda specimen, schedule: f"{specimen}, {schedule}",
)
def test_a_stage_holds_what_a_search_says(on_ranks, specimen, schedule):
    plugins = (PipelineConfig(pp_schedule=schedule),)
    options = case({"pp_size": 2}, False, None, plugins)
    measured = on_ranks(2, on_rank_measure, specimen, options, 4)
    said = estimated(specimen, options, 2, 4)

    for on_rank, states in zip(measured, said, strict=True):
        assert_holds(on_rank, states)


def on_rank_receive(options, rows):
    """Return the pipeline rank, and the bytes of the buffers in which its schedule receives from other stages."""
    initialize_distributed("gloo")
    setup = DistributedSetup.build(**options)
    model = SPECIMENS["llama-deep"].load.from_config(
        SPECIMENS["llama-deep"].config(), distributed_setup=setup, dtype=torch.float32
    )
    runtime = setup.runtime(model)
    batch = SPECIMENS["llama-deep"].batch(rows, LENGTH, torch.Generator().manual_seed(0))
    runtime.forward_backward({"input_ids": batch["input_ids"], "labels": batch["input_ids"].clone()})
    (schedule,) = model._built.values()
    stages = getattr(schedule, "_stages", None) or [schedule._stage]
    kept = [
        info for stage in stages for infos in (stage.args_recv_info, stage.grad_recv_info) for info in infos.values()
    ]
    buffers = [one.buffer for info in kept for one in info if getattr(one, "buffer", None) is not None]
    return model.info.pp_rank, held(buffers)


@cases(
    ("world", "sizes", "schedule"),
    [(4, {"cp_size": 2}, "1F1B"), slow(2, {}, "1F1B"), slow(2, {}, "Interleaved1F1B"), slow(4, {"tp_size": 2}, "1F1B")],
    lambda world, sizes, schedule: case_id(sizes, schedule),
)
def test_a_stage_receives_into_the_buffers_that_a_search_says(on_ranks, world, sizes, schedule):
    """The context plugin acts after the pipeline, so the sequence is not yet split when the pipeline answers."""
    options = case({"pp_size": 2, **sizes}, False, None, (PipelineConfig(pp_schedule=schedule),))
    setup = DistributedSetup.build(**options, world_size=world)
    estimator = Estimator(
        model=SearchedModel(SPECIMENS["llama-deep"].config()), hardware=Hardware.named("cpu"), batch=4, length=LENGTH
    )
    shares = estimator.shares(Topology.of(setup, options["plugins"]), 1)

    said = [share.held["pipeline buffers"] for share in shares]
    assert all(said)
    for place, received in on_ranks(world, on_rank_receive, options, 4):
        assert received == said[place]


def searched(config, sizes, imbalance):
    """Return the bytes of activations and the seconds of a step, as a search says them for two ranks."""
    setup = DistributedSetup.build(**case(sizes), world_size=2)
    model, hardware = SearchedModel(config), Hardware.named("cpu")
    estimator = Estimator(model=model, hardware=hardware, batch=2, length=LENGTH, imbalance=imbalance)
    found = estimator.estimate(Topology.of(setup), 1, lambda size: True)
    return found.memory["activations"], found.seconds


def test_tokens_are_uneven_only_where_ranks_share_the_experts():
    """A rank with all experts gets the tokens of all of them, however they are routed."""
    config = SPECIMENS["qwen3-moe"].config()
    config.output_router_logits = False

    assert searched(config, {}, 3.0) == searched(config, {}, 1.0)
    uneven, even = (searched(config, {"ep_size": 2}, imbalance) for imbalance in (3.0, 1.0))
    assert uneven[0] > 1.5 * even[0] and uneven[1] > even[1]


def test_a_convolution_is_no_expert():
    """Its weight has three dims, as stacked experts have."""
    model = SearchedModel(tiny("lfm2").config)
    assert any(parameter.ndim == 3 for parameter in model.whole.parameters())
    assert not model.routed
    assert SearchedModel(SPECIMENS["qwen3-moe"].config()).routed


def test_a_search_drops_tensor_parallelism_that_a_load_refuses():
    """Llama 4 flattens the tokens of all rows, so its blocks do not compute the same with cut tokens."""
    model = meta_model(tiny("llama4_text").config)
    for sequence in (False, True):
        strategy = FSDP2Config(sequence_parallel=sequence)
        setup = DistributedSetup.build(strategy, ParallelismSizes(tp_size=2), world_size=2)
        whole, facts = RankShare.whole(model, 1, LENGTH), ModelFacts.of(model, 1, LENGTH, None, False)
        refused = pytest.raises(TopologyError, match="does not compute with cut tokens") if sequence else nullcontext()
        with refused:
            divide(whole, setup.calls, setup.strategy, setup.plan, facts, model)
