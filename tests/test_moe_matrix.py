"""Every kind of model with experts beside every other axis: loss with router loss, gradients, norm and three steps."""

import pytest
from cases import case_id, cases

from nemo_dist import FSDP2Config, ParallelismSizes
from nemo_dist.testing.equivalence import Task, assert_equivalent, trained
from nemo_dist.testing.precision import FP32

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

# Plain, another family, with shared experts, and with latent attention, shared experts and a dense first layer. The
# last has no router loss in transformers: it balances by a bias.
MODELS = ("qwen3-moe", "mixtral", "qwen2-moe", "deepseek-v3")
TOPOLOGIES = {
    "ep": (2, {"ep_size": 2}, False),
    "ep-fsdp": (4, {"ep_size": 2}, False),
    "ep-all": (4, {"ep_size": 4}, False),
    "ep-hsdp": (4, {"ep_size": 2, "dp_replicate_size": 2}, False),
    "ep-across-replicas": (4, {"ep_size": 4, "dp_replicate_size": 2}, False),
    "ep-fsdp-hsdp": (8, {"ep_size": 2, "dp_replicate_size": 2}, False),
    "ep-tp": (4, {"ep_size": 2, "tp_size": 2}, False),
    "ep-over-tp": (4, {"ep_size": 4, "tp_size": 2}, False),
    "ep-tp-only": (4, {"ep_size": 2, "tp_size": 4}, False),
    "ep-cp": (4, {"ep_size": 2, "cp_size": 2}, False),
    "ep-over-cp": (4, {"ep_size": 4, "cp_size": 2}, False),
    "ep-pp": (4, {"ep_size": 2, "pp_size": 2}, False),
    "ep-tp-replicas": (4, {"ep_size": 2, "tp_size": 2, "dp_replicate_size": 2}, False),
    "ep-cp-replicas": (4, {"ep_size": 2, "cp_size": 2, "dp_replicate_size": 2}, False),
    "ep-over-tp-replicas": (4, {"ep_size": 4, "tp_size": 2, "dp_replicate_size": 2}, False),
    "ep-pp-replicas": (4, {"ep_size": 2, "pp_size": 2, "dp_replicate_size": 2}, False),
    "ep-full": (4, {"ep_size": 2}, "full"),
    "ep-selective": (4, {"ep_size": 2}, "selective"),
    "ep-hsdp-tp-full": (8, {"ep_size": 4, "dp_replicate_size": 2, "tp_size": 2}, "full"),
    "ep-hsdp-cp-selective": (8, {"ep_size": 2, "dp_replicate_size": 2, "cp_size": 2}, "selective"),
    "ep-tp-cp-full": (8, {"ep_size": 8, "cp_size": 2, "tp_size": 2}, "full"),
    "ep-tp-pp-full": (8, {"ep_size": 2, "pp_size": 2, "tp_size": 2}, "full"),
    "five-8": (8, {"ep_size": 4, "pp_size": 2, "tp_size": 2, "cp_size": 2}, False),
    "five-16": (16, {"ep_size": 4, "pp_size": 2, "tp_size": 2, "cp_size": 2}, False),
}
# Every rank has all experts, or its share of each: their router loss is one number over all ranks here too.
WHOLE = {
    "fsdp2": (2, {}, {"activation_checkpointing": "full"}),
    "hsdp": (4, {"dp_replicate_size": 2}, {}),
    "ddp": (2, {}, {"strategy": "ddp"}),
    "cp": (4, {"cp_size": 2}, {}),
    "tp": (4, {"tp_size": 2}, {}),
    "sequence": (4, {"tp_size": 2}, {"strategy": FSDP2Config(mp_policy=FP32, sequence_parallel=True)}),
    "cp-tp": (8, {"cp_size": 2, "tp_size": 2}, {}),
    "pp": (4, {"pp_size": 2}, {}),
    "pp-cp-tp": (8, {"pp_size": 2, "cp_size": 2, "tp_size": 2}, {}),
}


def unfit(model, topology):
    """Whether four experts are to be shared by more ranks, or no plan says how to cut a model's tokens."""
    _, sizes, _ = (TOPOLOGIES | WHOLE)[topology]
    return (model == "mixtral" and sizes.get("ep_size", 1) > 4) or (model == "deepseek-v3" and topology == "sequence")


@cases(("model", "topology"), [(model, name) for name in TOPOLOGIES for model in MODELS if not unfit(model, name)])
def test_a_model_with_experts_matches_one_process(ranks, model, topology):
    world, sizes, recompute = TOPOLOGIES[topology]
    train(ranks(world), model, sizes, recompute)


@cases(("model", "topology"), [(model, name) for name in WHOLE for model in MODELS if not unfit(model, name)])
def test_experts_without_expert_parallelism_match_one_process(ranks, model, topology):
    world, sizes, more = WHOLE[topology]
    train(ranks(world), model, sizes, False, **more)


@pytest.mark.parametrize("model", ["qwen3-moe-deep", "deepseek-v3-deep"])
@pytest.mark.parametrize(
    "schedule", ["gpipe", "1f1b", "looped_bfs", "interleaved_1f1b", "zero_bubble", "zbv", "dualpipev"]
)
def test_experts_under_every_schedule_match_one_process(ranks, model, schedule):
    train(ranks(4), model, {"ep_size": 2, "pp_size": 2}, False, pipeline_config={"pp_schedule": schedule})


@pytest.mark.parametrize(
    "sizes", [{"ep_size": 2, "dp_replicate_size": 2, "tp_size": 2}, {"ep_size": 4, "tp_size": 2}], ids=case_id
)
def test_replicated_parameters_stay_equal_over_many_steps(ranks, sizes):
    """What several ranks hold is compared bit for bit; against one process, rounding may send a token elsewhere."""
    task = Task(specimen="qwen3-moe", steps=20)
    strategy = FSDP2Config(mp_policy=FP32)
    trained(ranks(8), task, strategy=strategy, parallelism_sizes=ParallelismSizes(**sizes))


def train(pool, model, sizes, recompute, **more):
    options = {"strategy": FSDP2Config(mp_policy=FP32), "activation_checkpointing": recompute, **more}
    assert_equivalent(pool, Task(specimen=model), parallelism_sizes=ParallelismSizes(**sizes), **options)
