"""Ranks that use different parameters of a model in a step get the gradients of one process, or an error in words."""

import pytest
import torch
import transformers
from own_models import SIZES, OwnConfig, OwnModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from nemo_dist import DistributedSetup, FSDP2Config, NeMoAutoModelForCausalLM, ParallelismSizes, PipelineConfig
from nemo_dist.errors import RankError
from nemo_dist.testing.equivalence import TOLERANCE, tensor_differences, whole_state
from nemo_dist.testing.precision import FP32
from nemo_dist_fsdp2.sharding import shard
from nemo_dist_fsdp2.unlike_ranks import Gradients

# The branches of the batches of each rank; none of them takes branch 3. A rank takes one twice, or two once.
TAKEN = {"branching": [(0, 0), (1, 2), (2, 0), (1, 1)], "experts": [(None, None)] * 2}
SETUPS = {
    "branching": (2, "branching", {}, {}),
    "experts": (2, "experts", {}, {}),
    "experts-recompute": (2, "experts", {}, {"activation_checkpointing": True}),
    "branching-hsdp": (4, "branching", {"dp_replicate_size": 2}, {}),
}

UNLIKE_ROWS = torch.randint(3, 90, (13, 6), generator=torch.Generator().manual_seed(3))


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


def on_rank_pipeline():
    """Train on 8 rows on one data rank, which are 4 microbatches, and on 5 on the other, which are 3."""
    setup = DistributedSetup.build(
        FSDP2Config(mp_policy=FP32), ParallelismSizes(pp_size=2), PipelineConfig(pp_microbatch_size=2)
    )
    torch.manual_seed(0)
    model = NeMoAutoModelForCausalLM.from_config(config("transposed"), distributed_setup=setup, dtype=torch.float32)
    runtime = setup.runtime(model)
    mine = UNLIKE_ROWS[:8] if runtime.dp_rank == 0 else UNLIKE_ROWS[8:]
    loss = runtime.forward_backward({"input_ids": mine, "labels": mine}).item()
    named = {name: one.grad for name, one in runtime.named_parameters() if one.grad is not None}
    return loss, whole_state(runtime, named)


def test_ranks_with_unlike_numbers_of_microbatches_train_like_one_process(ranks):
    """Own code compares what ranks gather, and not how many microbatches they run."""
    torch.manual_seed(0)
    model = OwnModel(config("transposed")).eval()
    loss = model(input_ids=UNLIKE_ROWS, labels=UNLIKE_ROWS).loss
    loss.backward()
    expected = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    found = ranks(4).run(on_rank_pipeline)
    assert {name for _, gradients in found for name in gradients} == expected.keys()
    for mean, gradients in found:
        assert mean == pytest.approx(loss.item(), rel=TOLERANCE)
        of_stage = {name: expected[name] for name in gradients}
        assert tensor_differences("gradients", gradients, of_stage, TOLERANCE) == []


class Normed(LlamaRMSNorm):
    """A norm that a library computes in its own way."""


def with_norms(model):
    """Return *model* with norms of own code."""
    for layer in model.model.layers:
        layer.input_layernorm.__class__ = Normed
    return model


def on_rank_count():
    """Return how often this rank compares what it does in a step, with a model of transformers and others."""
    said = []
    setup = DistributedSetup.build(FSDP2Config(mp_policy=FP32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gradients, "agree", lambda _, what: said.append(what))
        for model in (llama(), with_norms(llama()), OwnModel(config(""))):
            said.append(0)
            shard(model, setup.mesh_context, FSDP2Config(mp_policy=FP32))
            model(**batches("experts", 0)[0]).loss.backward()
    return said


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def test_ranks_compare_what_they_gather_only_where_own_code_runs_groups(ranks):
    """Each message makes the host wait, and norms of own code do not choose what is gathered."""
    for said in ranks(2).run(on_rank_count):
        assert said[:3] == [0, 0, 0]
        assert "gathers model.layers.0" in said


def decay(parameter):
    """Step *parameter* in the backward, with a decay of its weights."""
    parameter.mul_(0.5).sub_(0.1 * parameter.grad)


def on_rank_decay():
    runtime = loaded("branching", FP32, {}, {})
    for _, one in runtime.named_parameters():
        one.register_post_accumulate_grad_hook(decay)
    runtime.forward_backward(batches("branching", runtime.dp_rank)[0])
    return whole_state(runtime, {name: one.detach() for name, one in runtime.named_parameters()})


def test_a_step_in_the_backward_leaves_alone_what_no_rank_used(ranks):
    torch.manual_seed(0)
    model = OwnModel(config("branching"))
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    for one in model.parameters():
        one.register_post_accumulate_grad_hook(decay)
    (sum(model(**batches("branching", rank)[0]).loss for rank in range(2)) / 2).backward()
    expected = {name: one.detach() for name, one in model.named_parameters()}
    assert torch.equal(expected["model.branches.3.weight"], before["model.branches.3.weight"])
    assert not torch.equal(expected["model.branches.1.weight"], before["model.branches.1.weight"])

    for found in ranks(2).run(on_rank_decay):
        assert tensor_differences("weights", found, expected, TOLERANCE) == []
