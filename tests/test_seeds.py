"""One call seeds a run: ranks with different batches draw unlike numbers, ranks that share one the same."""

import random

import numpy
import pytest
import torch
import transformers
from cases import cases, slow

from nemo_dist import (
    DistributedSetup,
    FSDP2Config,
    NeMoAutoModelForCausalLM,
    ParallelismSizes,
    initialize_distributed,
)
from nemo_dist.testing.equivalence import (
    MAX_NORM,
    OPTIMIZER,
    Outcome,
    checkpoint,
    differences,
    merged,
    whole_state,
)
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.tensors import rows_of_rank
from nemo_dist.testing.tiny_models import SPECIMENS
from nemo_dist.training.seed import seed_of

SEED = 7
DROPOUT = {"resid_pdrop": 0.2, "embd_pdrop": 0.1, "attn_pdrop": 0.1}


def setup_of(sizes, **options):
    return DistributedSetup.build(
        strategy=FSDP2Config(mp_policy=FP32), parallelism_sizes=ParallelismSizes(**sizes), **options
    )


def on_rank_draw(sizes):
    initialize_distributed("gloo")
    setup = setup_of(sizes)
    setup.seed(SEED)
    drawn = torch.rand(3).tolist(), random.random(), numpy.random.rand()
    return setup.mesh_context.rank("dp"), drawn


@cases(("count", "sizes"), [(2, {}), (2, {"tp_size": 2}), (2, {"cp_size": 2}), (2, {"pp_size": 2}),
       slow(4, {"tp_size": 2}), slow(4, {"dp_replicate_size": 2})])  # fmt: skip
def test_ranks_draw_alike_where_they_share_a_batch_and_unlike_elsewhere(on_ranks, count, sizes):
    found = on_ranks(count, on_rank_draw, sizes)

    for place, drawn in found:
        for other, others in found:
            assert (drawn == others) == (place == other)
    torch.manual_seed(SEED)
    assert found[0][1][0] == torch.rand(3).tolist()  # the first batch has the numbers of one process


def test_seeds_of_places_are_all_different_and_numbers_that_every_generator_takes():
    seeds = [seed_of(seed, place) for seed in (0, 1, 2**63 - 1) for place in range(500)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return SPECIMENS["gpt2"].batch(4, 12, generator)


def on_rank_train(folder, sizes, options):
    initialize_distributed("gloo")
    setup = setup_of(sizes, **options)
    model = NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32, **DROPOUT)
    runtime = setup.runtime(model)
    for part in runtime.parts:
        part.train()
    setup.seed(SEED)
    optimizer = runtime.optimizer(torch.optim.AdamW, **OPTIMIZER)
    losses, norms, gradients = [], [], {}
    for step in range(3):
        losses.append(runtime.forward_backward(rows_of_rank(batch(step), runtime)).item())
        if step == 0:
            gradients = whole_state(runtime, {n: p.grad for n, p in runtime.named_parameters()})
        norms.append(runtime.clip_grad_norm_(MAX_NORM).item())
        optimizer.step()
        optimizer.zero_grad()
    parameters = whole_state(runtime, dict(runtime.named_parameters()))
    return Outcome(losses=losses, norms=norms, gradients=gradients, parameters=parameters)


def one_process(folder, shares):
    """Train one model on each share of the rows with the generator of that data-parallel rank."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **DROPOUT).train()
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIMIZER)
    states = [torch.Generator().manual_seed(seed_of(SEED, place)).get_state() for place in range(shares)]
    losses, norms, gradients = [], [], {}
    for step in range(3):
        own = [{name: value.chunk(shares)[place] for name, value in batch(step).items()} for place in range(shares)]
        counts = [(rows["labels"][:, 1:] != -100).sum() for rows in own]
        total = 0.0
        for place, (rows, count) in enumerate(zip(own, counts, strict=True)):
            torch.set_rng_state(states[place])
            loss = model(**rows).loss * count / sum(counts)
            states[place] = torch.get_rng_state()
            loss.backward()
            total += loss.item()
        if step == 0:
            gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        losses.append(total)
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).item())
        optimizer.step()
        optimizer.zero_grad()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return Outcome(losses=losses, norms=norms, gradients=gradients, parameters=parameters)


@cases(("count", "sizes", "options"), [
    (2, {}, {}), (2, {}, {"activation_checkpointing": True}), slow(4, {"dp_replicate_size": 2}, {}),
])  # fmt: skip
def test_dropout_is_that_of_one_process_with_the_generator_of_each_batch(on_ranks, count, sizes, options):
    folder = checkpoint("gpt2")
    found = merged(on_ranks(count, on_rank_train, folder, sizes, options))

    assert differences(found, one_process(folder, count)) == []


def test_equal_seeds_give_equal_runs_and_others_do_not(on_ranks):
    folder = checkpoint("gpt2")
    first, second = (merged(on_ranks(2, on_rank_train, folder, {"pp_size": 2}, {})) for _ in range(2))
    assert first.losses == second.losses and first.norms == second.norms
    assert first.losses != one_process(folder, 1).losses  # the masks of a stage are its own


def on_rank_refusal(folder):
    initialize_distributed("gloo")
    with pytest.raises(ValueError) as caught:
        NeMoAutoModelForCausalLM.from_pretrained(
            folder, distributed_setup=setup_of({"tp_size": 2}), attention_dropout=0.1
        )
    return str(caught.value)


def test_dropout_stays_refused_where_matrices_are_cut(on_ranks):
    for message in on_ranks(2, on_rank_refusal, checkpoint("llama")):
        assert "set attention_dropout to 0 in the model" in message
