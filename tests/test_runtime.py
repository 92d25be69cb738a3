"""What a training loop holds: the loop of the public API, loops of one's own, and what is refused."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor

from nemo_dist import DDPConfig, DistributedSetup, FSDP2Config, NeMoAutoModelForCausalLM, ParallelismSizes
from nemo_dist.testing.equivalence import Task, checkpoint, reference
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.tensors import rows_of_rank, whole
from nemo_dist.testing.tiny_models import SPECIMENS
from nemo_dist.training.grad_norm import global_norm
from nemo_dist.training.loss_weighting import count_labels

STRATEGIES = {"fsdp2": FSDP2Config(mp_policy=FP32), "ddp": DDPConfig()}


def start(strategy, folder=None, **options):
    setup = DistributedSetup.build(strategy=STRATEGIES[strategy], **options)
    model = NeMoAutoModelForCausalLM.from_pretrained(folder or checkpoint("llama"), distributed_setup=setup)
    return setup, model, setup.runtime(model)


def on_rank_learn_nothing(strategy, folder):
    _, model, runtime = start(strategy, folder)
    tokens = torch.arange(1, 13).reshape(2, 6)
    loss = runtime.forward_backward({"input_ids": tokens, "labels": torch.full_like(tokens, -100)})
    return (
        loss.item(),
        [whole(p.grad).abs().max().item() for p in model.parameters()],
        runtime.clip_grad_norm_(1.0).item(),
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_batch_without_labels_has_zero_loss_and_zero_gradients(ranks, strategy):
    for loss, gradients, norm in ranks(2).run(on_rank_learn_nothing, strategy, checkpoint("llama")):
        assert (loss, norm, set(gradients)) == (0.0, 0.0, {0.0})


def on_rank_own_loop(strategy, folder, task):
    _, model, runtime = start(strategy, folder)
    batches = [rows_of_rank(batch, runtime) for batch in task.batches(0)]
    counts = torch.stack([count_labels(model, batch) for batch in batches])
    total = counts.sum()
    dist.all_reduce(total)
    for index, batch in enumerate(batches):
        loss = model(**runtime.batch(batch)).loss * counts[index] / total * runtime.dp_size
        if index < len(batches) - 1:
            with runtime.no_sync():
                loss.backward()
        else:
            loss.backward()
    return {name: whole(parameter.grad) for name, parameter in runtime.named_parameters()}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_hand_written_loop_with_no_sync_gets_the_same_gradients(ranks, strategy):
    task = Task(specimen="llama", accumulate=3, seed=0)
    expected = reference(task).gradients

    for found in ranks(2).run(on_rank_own_loop, strategy, checkpoint("llama"), task):
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def two_of_one_forward(model, batches):
    loss = model(**batches[0]).loss
    loss.backward(retain_graph=True)
    loss.backward()


def two_of_two_forwards(model, batches):
    losses = [model(**batch).loss for batch in batches]
    for loss in losses:
        loss.backward()


def of_the_parts_of_the_model(model, batches):
    labels = batches[0]["labels"]
    logits = model.lm_head(model.model(input_ids=batches[0]["input_ids"]).last_hidden_state)
    model.loss_function(logits=logits, labels=labels, vocab_size=model.config.vocab_size).backward()


BACKWARDS = [two_of_one_forward, two_of_two_forwards, of_the_parts_of_the_model]


def on_rank_backwards(folder, how, batches):
    _, model, runtime = start("ddp", folder)
    mine = [{name: value[runtime.dp_rank :: 2] for name, value in batch.items()} for batch in batches]
    BACKWARDS[how](model, mine)
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("how", range(len(BACKWARDS)), ids=[how.__name__ for how in BACKWARDS])
def test_ddp_averages_the_gradients_of_every_backward(ranks, how):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 90, (2, 4, 12), generator=generator)
    batches = [{"input_ids": rows, "labels": rows} for rows in tokens]
    model = NeMoAutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    BACKWARDS[how](model, batches)
    for found in ranks(2).run(on_rank_backwards, checkpoint("llama"), how, batches):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


def on_rank_copy(folder, batches):
    """Return the gradients of a copy of a model that had a step, and the average that torch makes of both."""
    _, model, runtime = start("ddp", folder)
    mine = [{name: value[runtime.dp_rank :: 2] for name, value in batch.items()} for batch in batches]
    model(**mine[0]).loss.backward()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    twin = averaged.module
    twin.zero_grad()
    twin(**mine[1]).loss.backward()
    return {name: parameter.grad for name, parameter in twin.named_parameters()}


def test_a_copy_of_a_ddp_model_averages_gradients_too(ranks):
    tokens = torch.randint(3, 90, (2, 4, 12), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": rows, "labels": rows} for rows in tokens]
    model = NeMoAutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    model(**batches[1]).loss.backward()
    for found in ranks(2).run(on_rank_copy, checkpoint("llama"), batches):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


def on_rank_place(folder, options):
    _, _, runtime = start("fsdp2", folder, **options)
    return runtime.dp_rank, runtime.dp_size


def test_every_rank_has_its_own_data_parallel_rank(ranks):
    options = {"parallelism_sizes": ParallelismSizes(dp_replicate_size=2)}
    assert ranks(4).run(on_rank_place, checkpoint("llama"), options) == [(0, 4), (1, 4), (2, 4), (3, 4)]


def on_rank_norms(folder, norm_type):
    _, _, runtime = start("fsdp2", folder)
    tokens = torch.arange(1, 25).reshape(2, 12)
    runtime.forward_backward({"input_ids": tokens, "labels": tokens})
    return runtime.clip_grad_norm_(1e-3, norm_type).item(), runtime.clip_grad_norm_(1.0, norm_type).item()


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
def test_clipping_reduces_the_global_norm_of_every_type(ranks, norm_type):
    model = NeMoAutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    tokens = torch.arange(1, 25).reshape(2, 12)
    model(input_ids=tokens, labels=tokens).loss.backward()
    expected = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3, norm_type).item()

    for before, after in ranks(2).run(on_rank_norms, checkpoint("llama"), norm_type):
        assert before == pytest.approx(expected, rel=1e-5)
        assert after == pytest.approx(1e-3, rel=1e-3)


def on_rank_unknown_norm(folder):
    """Return the norms of gradients of which the last rank has one that is no number."""
    _, _, runtime = start("fsdp2", folder)
    tokens = torch.arange(1, 25).reshape(2, 12)
    runtime.forward_backward({"input_ids": tokens, "labels": tokens})
    if dist.get_rank() == 1:
        for _, parameter in runtime.named_parameters():
            parameter.grad.to_local()[-1:] = torch.nan
    return [runtime.clip_grad_norm_(1.0, norm_type).item() for norm_type in (float("inf"), 2.0)]


def test_a_gradient_that_is_no_number_makes_every_norm_unknown_on_all_ranks(ranks):
    for norms in ranks(2).run(on_rank_unknown_norm, checkpoint("llama")):
        assert all(norm != norm for norm in norms), norms


def on_rank_norms_of_less_rows_than_ranks():
    mesh = DistributedSetup.build(strategy=FSDP2Config()).mesh_context
    gradient = distribute_tensor(torch.tensor([[3.0, -4.0]]), mesh["dp_shard"], [Shard(0)])  # none on the second rank
    return [global_norm([gradient], norm_type, (), mesh).item() for norm_type in (float("inf"), 2.0)]


def test_a_rank_without_a_row_of_a_gradient_takes_part_in_every_norm(ranks):
    assert ranks(2).run(on_rank_norms_of_less_rows_than_ranks) == [[4.0, 5.0]] * 2


def on_rank_no_clip(folder):
    """Return the norm of gradients with one that is infinite, and whether a clip to infinity left all as they were."""
    _, _, runtime = start("fsdp2", folder)
    tokens = torch.arange(1, 25).reshape(2, 12)
    runtime.forward_backward({"input_ids": tokens, "labels": tokens})
    gradients = [parameter.grad.to_local() for _, parameter in runtime.named_parameters()]
    gradients[-1][:1] = torch.inf
    before = [gradient.clone() for gradient in gradients]
    norm = runtime.clip_grad_norm_(float("inf")).item()
    return norm, all(map(torch.equal, gradients, before))


def test_a_clip_to_no_norm_leaves_gradients_as_they_are_where_one_is_infinite(ranks):
    assert ranks(2).run(on_rank_no_clip, checkpoint("llama")) == [(float("inf"), True)] * 2


def on_rank_group(folder):
    _, _, runtime = start("fsdp2", folder)
    decayed = [p for n, p in runtime.named_parameters() if p.ndim > 1]
    plain = [p for n, p in runtime.named_parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = runtime.optimizer(torch.optim.AdamW, groups, lr=1e-3)
    return [(group["weight_decay"], len(group["params"])) for group in optimizer.param_groups], len(decayed), len(plain)


def test_parameter_groups_are_kept(ranks):
    groups, decayed, plain = ranks(2).run(on_rank_group, checkpoint("llama"))[0]
    assert groups == [(0.1, decayed), (0.0, plain)]


def on_rank_buffer(folder, broadcast):
    """Return a buffer of the model after a step before which every rank had written its number into it."""
    setup = DistributedSetup.build(strategy=DDPConfig(broadcast_buffers=broadcast))
    model = NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup)
    model.register_buffer("seen", torch.zeros(2))
    runtime = setup.runtime(model)
    tokens = torch.arange(1, 25).reshape(2, 12)
    for _ in range(2):
        model.seen.fill_(torch.distributed.get_rank())
        runtime.forward_backward({"input_ids": tokens, "labels": tokens})
    return model.seen.tolist()


@pytest.mark.parametrize(("broadcast", "found"), [(True, [[0, 0], [0, 0]]), (False, [[0, 0], [1, 1]])])
def test_ddp_sends_buffers_where_it_is_asked_to(ranks, broadcast, found):
    assert ranks(2).run(on_rank_buffer, checkpoint("llama"), broadcast) == found


def on_rank_refusals(folder):
    setup, model, runtime = start("fsdp2", folder)
    other = DistributedSetup.build(strategy=STRATEGIES["fsdp2"])
    plain = NeMoAutoModelForCausalLM.from_pretrained(folder)
    messages = []
    for attempt in (
        lambda: runtime.forward_backward([]),
        lambda: runtime.forward_backward({"input_ids": torch.ones(1, 4, dtype=torch.long)}),
        lambda: other.runtime(model),
        lambda: setup.runtime(plain),
        lambda: setup.runtime("model"),
        lambda: runtime.clip_grad_norm_(1.0, norm_type=0),
    ):
        try:
            attempt()
            messages.append("nothing")
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_wrong_use_of_a_runtime_is_refused(ranks):
    empty, unlabelled, other, plain, text, norm = ranks(1).run(on_rank_refusals, checkpoint("llama"))[0]

    assert "empty list" in empty
    assert "norm_type must be above 0, or inf (got 0)" in norm
    assert "no labels" in unlabelled and "input_ids" in unlabelled
    assert "another setup" in other
    assert "no setup" in plain and "no setup" in text


def on_rank_default_precision(folder):
    seen = {}
    setup = DistributedSetup.build()
    model = NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    layer = model.model.layers[0].mlp.up_proj
    layer.register_forward_hook(
        lambda module, args, output: seen.update(weight=module.weight.dtype, output=output.dtype)
    )
    tokens = torch.arange(1, 13).reshape(2, 6)
    loss = setup.runtime(model).forward_backward({"input_ids": tokens, "labels": tokens})
    return seen, layer.weight.dtype, layer.weight.grad.dtype, loss.dtype


def test_the_default_computes_in_bfloat16_and_stores_in_float32(ranks):
    for seen, parameter, gradient, loss in ranks(2).run(on_rank_default_precision, checkpoint("llama")):
        assert seen == {"weight": torch.bfloat16, "output": torch.bfloat16}
        assert (parameter, gradient, loss) == (torch.float32, torch.float32, torch.float32)


@pytest.mark.parametrize(
    ("specimen", "batch", "count"),
    [
        ("llama", {"labels": torch.tensor([[1, 2, -100, 4], [-100, -100, 3, -100]])}, 3),
        ("llama", {"labels": torch.ones(1, 4).long(), "shift_labels": torch.tensor([[1, -100, 2, 3]])}, 3),
        ("llava", {"labels": torch.tensor([[1, 2, 3]])}, 2),
        ("gpt2", {"labels": torch.tensor([[1, 2, -100, 4]])}, 2),
        ("bert-tokens", {"labels": torch.tensor([[1, 2, -100]])}, 2),
        ("bert-sequences", {"labels": torch.tensor([1, -100, 2])}, 2),
        ("bert-sequences", {"labels": torch.zeros(2, 3)}, 6),
    ],
)
def test_labels_are_counted_as_the_models_own_loss_does(specimen, batch, count):
    assert count_labels(SPECIMENS[specimen].make(), batch).item() == count


def test_a_loss_whose_mean_is_not_known_is_refused():
    model = SPECIMENS["bert-tokens"].make()
    model.loss_type = "ForObjectDetection"
    with pytest.raises(ValueError, match=r"loss of type 'ForObjectDetection'.*known: "):
        count_labels(model, {"labels": torch.tensor([1])})
