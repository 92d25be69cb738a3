"""Ranks that use different parameters of a model in a step get the gradients of one process, or an error in words."""

import pytest
import torch
from own_models import SIZES, OwnConfig, OwnModel

from nemo_dist import DistributedSetup, FSDP2Config, NeMoAutoModelForCausalLM, ParallelismSizes
from nemo_dist.errors import RankError
from nemo_dist.testing.equivalence import TOLERANCE, tensor_differences, whole_state
from nemo_dist.testing.precision import FP32

# The branches of the batches of each rank; none of them takes branch 3. A rank takes one twice, or two once.
TAKEN = {"branching": [(0, 0), (1, 2), (2, 0), (1, 1)], "experts": [(None, None)] * 2}
SETUPS = {
    "branching": (2, "branching", {}, {}),
    "experts": (2, "experts", {}, {}),
    "experts-recompute": (2, "experts", {}, {"activation_checkpointing": True}),
    "branching-hsdp": (4, "branching", {"dp_replicate_size": 2}, {}),
}


def batches(change, rank):
    """Return the batches of *rank*: four tokens each, so that few experts are chosen."""
    found = []
    for index, branch in enumerate(TAKEN[change][rank]):
        generator = torch.Generator().manual_seed(10 * rank + index)
        tokens = torch.randint(3, 90, (1, 4), generator=generator)
        found.append({"input_ids": tokens, "labels": tokens} | ({} if branch is None else {"branch": branch}))
    return found


def config(change):
    return OwnConfig(**SIZES, change=change)


def loaded(change, policy, sizes, options):
    setup = DistributedSetup.build(FSDP2Config(mp_policy=policy), ParallelismSizes(**sizes), **options)
    torch.manual_seed(0)
    model = NeMoAutoModelForCausalLM.from_config(config(change), distributed_setup=setup, dtype=torch.float32)
    return setup.runtime(model)


def on_rank_train(change, policy, sizes, options, count):
    """Return the loss, the gradients, and the parameters after a step of an optimizer that decays weights."""
    runtime = loaded(change, policy, sizes, options)
    optimizer = runtime.optimizer(torch.optim.AdamW, lr=0.1, weight_decay=0.5)
    mine = batches(change, runtime.dp_rank)[:count]
    loss = runtime.forward_backward(mine)
    named = dict(runtime.named_parameters())
    gradients = whole_state(runtime, {name: one.grad for name, one in named.items() if one.grad is not None})
    optimizer.step()
    return loss.item(), gradients, whole_state(runtime, {name: one.detach() for name, one in named.items()})


def one_process(change, count, world=2):
    torch.manual_seed(0)
    model = OwnModel(config(change))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    total = 0.0
    for batch in (one for rank in range(world) for one in batches(change, rank)[:count]):
        loss = model(**batch).loss / (world * count)
        loss.backward()
        total += loss.item()
    gradients = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    optimizer.step()
    return total, gradients, {name: one.detach() for name, one in model.named_parameters()}


def compared(found, expected, tolerance=TOLERANCE):
    loss, gradients, weights = found
    wanted_loss, wanted_gradients, wanted_weights = expected
    assert gradients.keys() == wanted_gradients.keys()
    assert loss == pytest.approx(wanted_loss, rel=tolerance)
    assert tensor_differences("gradients", gradients, wanted_gradients, tolerance) == []
    if tolerance == TOLERANCE:
        unused = wanted_weights.keys() - wanted_gradients.keys()
        assert all(torch.equal(weights[name], wanted_weights[name]) for name in unused)


@pytest.mark.parametrize("count", [1, 2], ids=["one batch", "two batches"])
@pytest.mark.parametrize("case", SETUPS)
def test_ranks_that_use_different_parameters_train_like_one_process(ranks, case, count):
    world, change, sizes, options = SETUPS[case]
    expected = one_process(change, count, world)
    assert len(expected[1]) < len(expected[2]), "all parameters are used"
    for found in ranks(world).run(on_rank_train, change, FP32, sizes, options, count):
        compared(found, expected)


def test_batches_that_use_different_parameters_add_up_in_half_precision(ranks):
    """What waits for the last batch is kept in float32, and the gradients of that one are in bfloat16."""
    for found in ranks(2).run(on_rank_train, "branching", None, {}, {}, 2):
        compared(found, one_process("branching", 2), tolerance=0.1)


def on_rank_run_others(backward):
    runtime = loaded("branching blocks", FP32, {}, {})
    batch = batches("branching", 0)[0] | {"branch": runtime.dp_rank}
    with pytest.raises(RankError) as caught:
        runtime.forward_backward(batch) if backward else runtime.evaluate([batch])
    return str(caught.value)


@pytest.mark.parametrize("backward", [True, False], ids=["training", "evaluation"])
def test_ranks_that_run_different_blocks_are_told(ranks, backward):
    """Their collectives have the same sizes, so each rank would get a half of either block."""
    for rank, message in enumerate(ranks(2).run(on_rank_run_others, backward)):
        assert "ranks run different modules of a model that FSDP2 gathers one by one" in message
        assert f"rank {rank} now gathers model.branches.{rank}" in message
