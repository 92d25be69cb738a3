"""Whatever the order of calls, training is what it is on one process: a forward leaves nothing behind."""

import pytest
import torch
from cases import cases, slow
from hypothesis import HealthCheck, given, settings
from sent_bytes import Sent
from setups import DATA_PARALLEL

from nemo_dist import DDPConfig, DistributedSetup, FSDP2Config, MegatronFSDPConfig, ParallelismSizes
from nemo_dist.testing import strategies
from nemo_dist.testing.call_orders import assert_order_changes_nothing, possible
from nemo_dist.testing.equivalence import Task, checkpoint
from nemo_dist.testing.fake_cuda import WithCudaCalls
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.tensors import rows_of_rank, whole
from nemo_dist.testing.tiny_models import SPECIMENS

FSDP2 = FSDP2Config(mp_policy=FP32)
# A pipeline is no transformers model: it has an evaluation of its own, and neither generates nor runs a bare forward.
NO_MODEL = ("infer", "forward", "generate", "own_backward")


def fsdp2(**sizes):
    return {"strategy": FSDP2, "parallelism_sizes": ParallelismSizes(**sizes)}


TOPOLOGIES = {
    **{name: (4 if name == "hsdp" else 2, "llama", options, ()) for name, options in DATA_PARALLEL.items()},
    "tp": (2, "llama", fsdp2(tp_size=2), ()),
    "pp": (2, "llama", fsdp2(pp_size=2), NO_MODEL),
    "cp": (2, "llama", fsdp2(cp_size=2), ()),
    "ep": (2, "qwen3-moe", fsdp2(ep_size=2), ("own_backward",)),  # its loss has a part for the routers
    "megatron_fsdp": (2, "llama", {"strategy": MegatronFSDPConfig()}, ()),
    "megatron_fsdp, ZeRO 1": (2, "llama", {"strategy": MegatronFSDPConfig(zero_dp_strategy=1)}, ()),
    "megatron_fsdp, ZeRO 2": (2, "llama", {"strategy": MegatronFSDPConfig(zero_dp_strategy=2)}, ()),
    "megatron_fsdp, no overlap": (
        2,
        "llama",
        {"strategy": MegatronFSDPConfig(zero_dp_strategy=1, overlap_param_gather=False, overlap_grad_reduce=False)},
        (),
    ),
    "kept": (2, "llama", {"strategy": FSDP2Config(mp_policy=FP32, reshard_after_forward=False)}, ()),
    "resharded to 2": (4, "llama", {"strategy": FSDP2Config(mp_policy=FP32, reshard_after_forward=2)}, ()),
    "recompute": (2, "llama", {**fsdp2(), "activation_checkpointing": "full"}, ()),
    "sequence": (
        2,
        "llama",
        {**fsdp2(tp_size=2), "strategy": FSDP2Config(mp_policy=FP32, sequence_parallel=True)},
        (),
    ),
    "ddp, unused": (2, "llama", {"strategy": DDPConfig(find_unused_parameters=True)}, ()),
    "ddp, static": (2, "llama", {"strategy": DDPConfig(static_graph=True)}, ()),
}
STEP = ("forward_backward", "clip", "update", "zero_grad")
# Orders that went wrong, or might: each look at the model before, between and after everything else.
ORDERS = {
    "before the runtime": ("evaluate", "runtime", "optimizer", *STEP, *STEP, "evaluate"),
    "before the optimizer": ("runtime", "evaluate", "optimizer", *STEP, *STEP, "evaluate"),
    "between backward and step": (
        *("runtime", "optimizer", "forward_backward", "evaluate", "clip", "evaluate", "update", "evaluate"),
        *("zero_grad", "forward_backward", "evaluate", "update", "evaluate"),
    ),
    "a forward without its backward": (
        *("forward", "runtime", "forward", "optimizer", "forward", "forward_backward", "forward", "clip", "forward"),
        *("update", "forward", "zero_grad", "accumulate", "forward", "update", "evaluate", "export"),
    ),
    "in inference mode": ("infer", "runtime", "infer", "optimizer", *STEP, "infer", *STEP, "infer"),
    "generate": ("generate", "runtime", "generate", "optimizer", *STEP, "generate", *STEP, "generate"),
    "between save and load": (
        *("runtime", "optimizer", *STEP, "save", "evaluate", *STEP, "forward", "load", "evaluate", *STEP, "export"),
    ),
    "frozen and thawed": (
        *("evaluate", "freeze block", "runtime", "optimizer", *STEP, "thaw", "evaluate", "optimizer", *STEP),
        *("forward", "freeze head", "update", "zero_grad", *STEP, "evaluate"),
    ),
    "frozen and thawed while gradients wait": (
        *("runtime", "freeze embedding", "forward_backward", "thaw", "optimizer", "forward_backward", "freeze block"),
        *("forward_backward", *STEP, "thaw", *STEP),
    ),
    "an optimizer of some": (
        *("runtime", "freeze embedding", "optimizer", "thaw", "forward_backward", "zero_grad", "forward_backward"),
        *("update", "zero_grad_in_place", *STEP, *STEP),
    ),
    "gradients of one's own": (
        *("runtime", "optimizer", "forward_backward", "replace_gradients", "forward_backward", "drop block"),
        *("forward_backward", "halve_gradients", "clip", "forward_backward", "drop embedding", "update", *STEP),
    ),
    "a loop of one's own": (
        *("runtime", "optimizer", "own_backward", "evaluate", "own_backward", "clip", "update", "zero_grad"),
        *("own_backward", "shrink_weights", "forward", "update", "evaluate"),
    ),
    "an optimizer after the backward": (
        "runtime",
        "forward_backward",
        "optimizer",
        "update",
        "evaluate",
        *STEP[1:],
        *STEP,
    ),
    "a step without gradients": ("runtime", "optimizer", "update", "save", *STEP, "save", *STEP, "load", *STEP),
    "gradients set to zero": (
        *("runtime", "optimizer", "forward_backward", "zero_grad_in_place", "update", *STEP[:3], "zero_grad_in_place"),
        *("forward_backward", "update", "evaluate"),
    ),
    "a runtime more": ("runtime", "optimizer", *STEP, "evaluate", "runtime", *STEP, "evaluate"),
}
FEW = ("fsdp2", "ddp", "tp", "pp", "ep")  # by default; the rest is for the matrix
FOUND_UNDER_MEGATRON_FSDP = ("a forward without its backward", "frozen and thawed while gradients wait")


def one_backward_a_step(order):
    """Leave out what ZeRO 1 of megatron_fsdp refuses: a backward while reduced gradients of another wait."""
    waiting = False
    for call in order:
        backward = call in ("forward_backward", "own_backward", "accumulate")
        # The optimizer drops neither what was thawed since it was made nor what was frozen before.
        if not (waiting and (backward or call.startswith("freeze"))) and call != "thaw":
            yield call
        waiting = backward or (waiting and call not in ("zero_grad", "zero_grad_in_place"))


def prove(ranks, topology, order):
    world, specimen, options, without = TOPOLOGIES[topology]
    pool, order = ranks(world), possible(call for call in order if call not in without)
    if topology.startswith("megatron_fsdp"):
        pool = WithCudaCalls(pool)
    if topology in ("megatron_fsdp, ZeRO 1", "megatron_fsdp, no overlap"):
        order = one_backward_a_step(order)
    assert_order_changes_nothing(pool, list(order), specimen, **options)


def cell(topology, order):
    default = topology in FEW or (topology == "megatron_fsdp" and order in FOUND_UNDER_MEGATRON_FSDP)
    return (topology, order) if default else slow(topology, order)


@cases(("topology", "order"), [cell(topology, order) for topology in TOPOLOGIES for order in ORDERS])
def test_looking_at_the_model_changes_nothing(ranks, topology, order):
    prove(ranks, topology, ORDERS[order])


def drawn(ranks, topology, examples):
    """Run *examples* orders that Hypothesis draws."""

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(order=strategies.call_orders(without=TOPOLOGIES[topology][3]))
    def run(order):
        prove(ranks, topology, order)

    run()


@pytest.mark.parametrize("topology", FEW)
def test_a_few_drawn_orders_give_what_one_process_gives(ranks, topology):
    drawn(ranks, topology, examples=3)


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_any_order_gives_what_one_process_gives(ranks, topology):
    drawn(ranks, topology, examples=200)


def on_rank_accumulate_by_hand(folder, options, looks):
    """Return the gradients of two backwards, the first one unsynchronised, with forwards in between or without."""
    setup = DistributedSetup.build(**options)
    model = SPECIMENS["llama"].load.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    runtime = setup.runtime(model)
    first, second, other = (rows_of_rank(Task().batches(seed)[0], runtime) for seed in range(3))
    with runtime.no_sync():
        model(**first).loss.backward()
    if looks:
        with torch.no_grad():
            model(**other)
        model(**other)
        assert len(list(runtime.named_parameters())) > 1
    model(**second).loss.backward()
    return {name: whole(parameter.grad) for name, parameter in runtime.named_parameters()}


@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
def test_forwards_between_accumulated_batches_change_no_gradient(ranks, strategy):
    plain, looked = (
        ranks(2).run(on_rank_accumulate_by_hand, checkpoint("llama"), DATA_PARALLEL[strategy], looks)[0]
        for looks in (False, True)
    )
    assert plain.keys() == looked.keys() and all(torch.equal(plain[name], looked[name]) for name in plain)


# ---- what a step costs, and what it measures ----


def on_rank_measure_gathers(folder, specimen, options, batches):
    """Return the bytes that this rank sends to gather, in steps without and in one with an evaluation before it."""
    setup = DistributedSetup.build(**options)
    model = SPECIMENS[specimen].load.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    runtime = setup.runtime(model)
    (batch,) = Task(specimen=specimen).batches(0)
    given = [rows_of_rank(batch, runtime)] * batches
    found = []
    for evaluations in (0, 0, 2):
        for _ in range(evaluations):
            with torch.no_grad():
                model(**batch)
        with Sent() as counter:
            runtime.forward_backward(given)
        found.append(counter.sent["all-gather"])
    return found


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("specimen", ["llama", "qwen3-moe"])
def test_an_evaluation_costs_the_next_step_no_gather(ranks, specimen, batches):
    for first, second, evaluated in ranks(2).run(
        on_rank_measure_gathers, checkpoint(specimen), specimen, DATA_PARALLEL["fsdp2"], batches
    ):
        assert 0 < first == second == evaluated


def on_rank_evaluate_experts(folder, evaluations):
    setup = DistributedSetup.build(**fsdp2(ep_size=2))
    model = SPECIMENS["qwen3-moe"].load.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    runtime = setup.runtime(model)
    batch, other = (Task(specimen="qwen3-moe").batches(seed)[0] for seed in (0, 1))
    runtime.forward_backward(rows_of_rank(batch, runtime))
    for _ in range(evaluations):
        with torch.no_grad():
            model(**other)
    return runtime.metrics()


def test_an_evaluation_is_not_in_the_figures_of_the_step(ranks):
    folder = checkpoint("qwen3-moe")
    assert ranks(2).run(on_rank_evaluate_experts, folder, 2) == ranks(2).run(on_rank_evaluate_experts, folder, 0)


def on_rank_list_gathered(folder):
    """Train and freeze what was listed, and frozen, after a forward that left gathered parameters in the model."""
    setup = DistributedSetup.build(**DATA_PARALLEL["fsdp2"])
    model = SPECIMENS["llama"].load.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    (batch,) = Task().batches(0)
    runtime = setup.runtime(model)
    model(**batch)
    model.lm_head.requires_grad_(False)
    listed = list(model.parameters())
    optimizer = runtime.optimizer(torch.optim.SGD, [{"params": listed}], lr=0.1)
    runtime.forward_backward(rows_of_rank(batch, runtime))
    own = {id(parameter) for _, parameter in runtime.named_parameters()}
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return stepped == own, [name for name, p in runtime.named_parameters() if p.grad is None]


def test_what_is_listed_or_frozen_while_gathered_is_meant_for_the_shards(ranks):
    assert ranks(2).run(on_rank_list_gathered, checkpoint("llama")) == [(True, ["lm_head.weight"])] * 2


def on_rank_evaluate_a_frozen_model(folder, options):
    """Return the losses of a model that nobody trains, as a reference policy is, in every mode."""
    setup = DistributedSetup.build(**options)
    model = SPECIMENS["llama"].load.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    model.requires_grad_(False)
    (batch,) = Task().batches(0)
    losses = [model(**batch).loss.item()]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            losses.append(model(**batch).loss.item())
    return losses


@pytest.mark.parametrize("strategy", DATA_PARALLEL)
def test_a_model_that_is_never_trained_can_be_evaluated(ranks, strategy):
    (batch,) = Task().batches(0)
    loss = SPECIMENS["llama"].load.from_pretrained(checkpoint("llama"), dtype=torch.float32)(**batch).loss.item()
    world = TOPOLOGIES[strategy][0]
    for losses in ranks(world).run(on_rank_evaluate_a_frozen_model, checkpoint("llama"), DATA_PARALLEL[strategy]):
        assert losses == pytest.approx([loss] * 3, rel=1e-6)
