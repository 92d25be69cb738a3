"""What a search says that a rank holds is what a rank holds: parameters, gradients and optimizer state to the byte."""

import torch
from cases import case_id, cases, slow
from torch.distributed.tensor import DTensor

from nemo_dist import (
    ContextConfig,
    DistributedSetup,
    FSDP2Config,
    ParallelismSizes,
    PipelineConfig,
    initialize_distributed,
)
from nemo_dist.search.enumeration import Topology
from nemo_dist.search.estimate import Estimator
from nemo_dist.search.hardware import Hardware
from nemo_dist.search.model import SearchedModel
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.tiny_models import SPECIMENS

ROWS, LENGTH = 1, 32  # of a data-parallel rank; one row, as what is made once for all rows is no small part here


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def held(tensors):
    return sum(local(tensor).nbytes for tensor in tensors)


def on_rank_measure(specimen, options, rows):
    """Return the bytes of parameters, gradients and optimizer state of this rank."""
    initialize_distributed("gloo")
    setup = DistributedSetup.build(**options)
    config = SPECIMENS[specimen].config()
    config.output_router_logits = False
    model = SPECIMENS[specimen].load.from_config(config, distributed_setup=setup, dtype=torch.float32)
    runtime = setup.runtime(model)
    optimizer = runtime.optimizer(torch.optim.AdamW, lr=1e-3)
    batch = SPECIMENS[specimen].batch(rows, LENGTH, torch.Generator().manual_seed(0))
    batch = {"input_ids": batch["input_ids"], "labels": batch["input_ids"].clone()}  # no padding, no masked labels
    runtime.forward_backward(batch)
    parameters = [parameter for _, parameter in runtime.named_parameters()]
    gradients = held(parameter.grad for parameter in parameters if parameter.grad is not None)
    optimizer.step()
    state = held(
        value for found in optimizer.state.values() for value in found.values() if isinstance(value, torch.Tensor)
    )
    return {"parameters": held(parameters), "gradients": gradients, "optimizer state": state}


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
    return [estimator.states(rank) for rank in ranks]


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
    slow(2, "llama-tied", case({})),
    slow(2, "llama", case({"tp_size": 2})),
    slow(2, "llama", case({"tp_size": 2}, True)),
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
        options["activation_checkpointing"] and "recomputed",
    ),
)
def test_a_rank_holds_what_a_search_says(on_ranks, world, specimen, options):
    measured = on_ranks(world, on_rank_measure, specimen, options, ROWS)
    (said,) = estimated(specimen, options, world, ROWS)

    assert {kind: max(states[kind] for states in measured) for kind in said} == said


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

    assert measured == said
