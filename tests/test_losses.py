"""A loss of the user's own is, under every composition, what one process computes: numbers, gradients, steps."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from cases import cases, slow
from loss_runs import LOSSES, LossTask, assert_as_one_process, setups
from torch.nn.functional import cross_entropy, kl_div, log_softmax, logsigmoid, softmax

from nemo_dist import DDPConfig, DistributedSetup, FSDP2Config, NeMoAutoModelForCausalLM, ParallelismSizes
from nemo_dist.losses import DPO, Contrastive, CrossEntropy, Distillation, row_scores, top_k
from nemo_dist.testing.equivalence import checkpoint
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.tiny_models import SPECIMENS
from nemo_dist.training.step_loss import OwnLoss, summed
from nemo_dist.training.whole_rows import Outputs

# Setups that run one row at a time, and losses that take several together.
REFUSED = {(name, loss) for name in ("pp", "pp, filled up", "pp x tp", "pp x cp") for loss in ("dpo", "contrastive")}
REFUSED |= {("pp in pairs of rows", "contrastive")}
FIRST = {("fsdp2", "weighted"), ("cp", "of tokens")}
ALL = [
    (name, loss) if (name, loss) in FIRST else slow(name, loss)
    for name in setups()
    for loss in LOSSES
    if (name, loss) not in REFUSED
]


@cases(("name", "loss"), ALL)
def test_a_loss_of_ones_own_matches_one_process(ranks, name, loss):
    _, specimen, _ = setups()[name]
    assert_as_one_process(ranks, LossTask(specimen=specimen, loss=loss, length=13), name)


@cases(("name", "loss"), [("fsdp2", "weighted"), slow("cp", "of rows"), slow("pp", "weighted"), ("pp", "of tokens")])
def test_a_list_of_batches_with_a_loss_of_ones_own_matches_one_process(ranks, name, loss):
    assert_as_one_process(ranks, LossTask(loss=loss, accumulate=2), name)


@pytest.mark.parametrize("name", ["ep", pytest.param("pp", marks=pytest.mark.slow)])
def test_the_router_loss_is_added_to_a_loss_of_ones_own(ranks, name):
    assert_as_one_process(ranks, LossTask(specimen="qwen3-moe", loss="weighted", routers=True), name)


def test_rows_that_fill_up_a_microbatch_do_not_count(ranks):
    assert_as_one_process(ranks, LossTask(loss="of rows", rows=7), "pp in pairs of rows")
    assert_as_one_process(ranks, LossTask(loss="of rows"), "pp, filled up")  # microbatches without a row that counts


def sharpened(outputs, batch):
    labels = batch["labels"][:, 1:]
    logits = batch["sharpness"] * outputs.logits[:, :-1]
    return cross_entropy(logits.transpose(1, 2), labels, reduction="none"), torch.ones(labels.shape)


def on_rank_sharpen(folder, sizes):
    setup = DistributedSetup.build(strategy=FSDP2Config(mp_policy=FP32), parallelism_sizes=ParallelismSizes(**sizes))
    model = NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    runtime = setup.runtime(model, loss=sharpened)
    tokens = (torch.arange(48).view(4, 12) * 5) % 90 + 3
    batches = [
        {"input_ids": rows, "labels": rows, "sharpness": value}
        for rows, value in ((tokens[:2], torch.tensor(0.5)), (tokens[2:], torch.tensor(2.0)))
    ]
    return runtime.forward_backward(batches).item(), runtime.clip_grad_norm_(1e9).item()


def test_stages_take_a_value_without_rows_from_each_batch(ranks):
    folder = checkpoint("llama")
    (expected,) = ranks(1).run(on_rank_sharpen, folder, {})
    for found in ranks(2).run(on_rank_sharpen, folder, {"pp_size": 2}):
        assert found == pytest.approx(expected, rel=1e-5)


class Warmth(torch.nn.Module):
    """A loss with a temperature that is trained, a parameter of its own or one of the model."""

    def __init__(self, model=None):
        super().__init__()
        if model is None:
            self.temperature = torch.nn.Parameter(torch.tensor(0.3))
        self.read = lambda: self.temperature if model is None else model.temperature

    def forward(self, outputs, batch):
        labels = batch["labels"][:, 1:]
        logits = self.read().exp() * outputs.logits[:, :-1]
        return cross_entropy(logits.transpose(1, 2), labels, reduction="none"), (1 - labels % 3).float()


def rows_of_one_rank(rank, ranks=2):
    tokens = (torch.arange(48).view(4, 12) * 5) % 90 + 3
    return {"input_ids": tokens[rank::ranks], "labels": tokens[rank::ranks]}


def losses_that_train():
    """Return losses that read a trained parameter of their own in every way that a callable can."""
    temperature = torch.nn.Parameter(torch.tensor(0.3))
    module, scale = Warmth(), partial(lambda value, logits: value.exp() * logits, temperature)

    def warm(outputs, batch, logits):
        labels = batch["labels"][:, 1:]
        return cross_entropy(logits[:, :-1].mT, labels, reduction="none"), (labels != -100).float()

    class Called:
        def __init__(self):
            self.value = temperature

        def __call__(self, outputs, batch):
            return warm(outputs, batch, self.value.exp() * outputs.logits)

        def method(self, outputs, batch):
            return self(outputs, batch)

    return {
        "a module": module,
        "its method": module.forward,
        "a closure": lambda outputs, batch: warm(outputs, batch, temperature.exp() * outputs.logits),
        "a function in it": lambda outputs, batch: warm(outputs, batch, scale(outputs.logits)),
        "a partial": partial(
            lambda value, outputs, batch: warm(outputs, batch, value.exp() * outputs.logits), temperature
        ),
        "an object": Called(),
        "a method of one": Called().method,
    }


def on_rank_train_beside(folder):
    """Return what is said of each of these losses, and of one that reads another model, frozen and trained."""
    setup = DistributedSetup.build(strategy=DDPConfig())
    model, other = (NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup) for _ in range(2))

    def close(outputs, batch):
        labels = batch["labels"][:, 1:]
        own = cross_entropy(outputs.logits[:, :-1].mT, labels, reduction="none")
        theirs = other(input_ids=batch["input_ids"]).logits[:, :-1]
        return own + (outputs.logits[:, :-1] - theirs).square().mean(-1), torch.ones(labels.shape)

    said = {}
    for name, loss in {**losses_that_train(), "another model": close}.items():
        try:
            setup.runtime(model, loss=loss).forward_backward(rows_of_one_rank(dist.get_rank()))
        except ValueError as error:
            said[name] = str(error)
    return said


def test_a_loss_that_trains_what_is_not_the_models_is_refused_however_it_reads_it(ranks):
    for said in ranks(2).run(on_rank_train_beside, checkpoint("llama")):
        assert list(said) == list(losses_that_train())
        assert all("trains parameters of its own (" in message for message in said.values())


def on_rank_warm(folder, strategy, sizes):
    setup = DistributedSetup.build(strategy=strategy, parallelism_sizes=sizes)
    model = NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    loss = Warmth()
    runtime = setup.runtime(model, loss=loss)
    refusals = []
    for attempt in (
        lambda: runtime.forward_backward(rows_of_one_rank(runtime.dp_rank, runtime.dp_size)),
        lambda: runtime.optimizer(torch.optim.SGD, [*model.parameters(), *loss.parameters()], lr=0.1),
    ):
        with pytest.raises(ValueError) as refusal:
            attempt()
        refusals.append(str(refusal.value))
    model.zero_grad()
    model.temperature = torch.nn.Parameter(torch.tensor(0.3))
    runtime = setup.runtime(model, loss=Warmth(model))
    optimizer = runtime.optimizer(torch.optim.SGD, lr=0.1)
    found = runtime.forward_backward(rows_of_one_rank(runtime.dp_rank, runtime.dp_size)).item()
    norm, gradient = runtime.clip_grad_norm_(1e9).item(), model.temperature.grad.item()
    optimizer.step()
    return refusals, found, norm, gradient, model.temperature.item()


@pytest.mark.parametrize(
    ("strategy", "sizes"),
    [
        (FSDP2Config(mp_policy=FP32), None),
        (DDPConfig(), None),
        (FSDP2Config(mp_policy=FP32), ParallelismSizes(cp_size=2)),
    ],
    ids=["fsdp2", "ddp", "cp"],
)
def test_a_parameter_of_a_loss_is_trained_as_one_of_the_model_and_weights_may_be_negative(ranks, strategy, sizes):
    folder = checkpoint("llama")
    model = NeMoAutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.temperature = torch.nn.Parameter(torch.tensor(0.3))
    tokens = torch.cat([rows_of_one_rank(rank)["input_ids"] for rank in range(2)])
    losses, weights = Warmth(model)(model(input_ids=tokens), {"labels": tokens})
    assert weights.sum() < 0
    expected = (losses * weights).sum() / weights.sum()
    expected.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9).item()
    for refusals, *found in ranks(2).run(on_rank_warm, folder, strategy, sizes):
        gradient = model.temperature.grad.item()
        assert found == pytest.approx([expected.item(), norm, gradient, 0.3 - 0.1 * gradient], rel=1e-4)
        assert "the loss Warmth trains parameters of its own (temperature)" in refusals[0]
        assert "1 of the parameters are not the model's (the first is of shape ())" in refusals[1]


# ---- what the ready-made ones compute, by hand or by torch ----


def drawn():
    """Logits of two rows of four tokens, and labels, of which some do not count."""
    torch.manual_seed(0)
    labels = torch.tensor([[1, 4, -100, 2], [0, -100, -100, 3]])
    return Outputs({"logits": torch.randn(2, 4, 5, requires_grad=True)}), labels


def mean(loss, outputs, batch):
    total, count = summed(loss(outputs, batch), loss)
    assert loss.count(batch) == pytest.approx(count.item())
    return total / count


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_cross_entropy_with_class_weights_is_torchs(smoothing):
    outputs, labels = drawn()
    weights = torch.tensor([0.5, 1.0, 2.0, 0.1, 3.0])
    loss = CrossEntropy(class_weights=weights, z_loss=0.2, label_smoothing=smoothing)
    found = mean(loss, outputs, {"shift_labels": labels})
    logits, flat = outputs.logits.flatten(0, 1), labels.flatten()
    z = logits.logsumexp(-1)[flat >= 0] ** 2
    of = weights[flat[flat >= 0]]
    expected = cross_entropy(logits, flat, weight=weights, label_smoothing=smoothing) + 0.2 * (z * of).sum() / of.sum()
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="class_weights of 0 have no mean with it"):
        CrossEntropy(class_weights=weights - 0.1, label_smoothing=0.3)


def test_distillation_is_torchs_divergence_and_its_top_k_that_of_the_likeliest_tokens():
    outputs, labels = drawn()
    teacher = torch.randn(2, 4, 5)
    counted = labels >= 0
    student = log_softmax(outputs.logits[counted] / 2, -1)
    expected = 4 * kl_div(student, softmax(teacher[counted] / 2, -1), reduction="batchmean")
    batch = {"shift_labels": labels, "teacher_logits": teacher}
    torch.testing.assert_close(mean(Distillation(temperature=2.0), outputs, batch), expected)
    whole = mean(Distillation(temperature=2.0), outputs, {"shift_labels": labels} | top_k(teacher, 5))
    torch.testing.assert_close(whole, expected)
    best = teacher[counted].argmax(-1)  # all of the teacher's probability
    one = mean(Distillation(), outputs, {"shift_labels": labels} | top_k(teacher, 1))
    torch.testing.assert_close(one, cross_entropy(outputs.logits[counted], best))


def test_dpo_prefers_the_chosen_row_by_more_than_the_reference_does():
    outputs, labels = drawn()
    reference = torch.tensor([-3.0, -2.5])
    scores = row_scores(outputs, {"shift_labels": labels})
    chosen = log_softmax(outputs.logits, -1)
    torch.testing.assert_close(scores[0], chosen[0, 0, 1] + chosen[0, 1, 4] + chosen[0, 3, 2])
    found = mean(DPO(beta=0.3), outputs, {"shift_labels": labels, "reference_scores": reference})
    torch.testing.assert_close(found, -logsigmoid(0.3 * ((scores[0] + 3.0) - (scores[1] + 2.5))))


def test_a_contrastive_loss_picks_the_passage_of_each_query():
    torch.manual_seed(0)
    hidden = torch.randn(4, 3, 6, requires_grad=True)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]])
    loss = LOSSES["contrastive"](None)
    found = mean(loss, Outputs({"last_hidden_state": hidden}), {"input_ids": mask, "attention_mask": mask})
    pooled = [hidden[0].mean(0), hidden[1, :2].mean(0), hidden[2, 0], hidden[3].mean(0)]
    similar = [[torch.cosine_similarity(q, p, dim=0) / 0.05 for p in pooled[1::2]] for q in pooled[0::2]]
    torch.testing.assert_close(found, cross_entropy(torch.tensor(similar), torch.arange(2)))


# ---- what is refused ----


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.ones(2), "must return two values: .* \\(got one tensor of shape \\(2,\\)\\)"),
        ((torch.ones(2), torch.ones(3)), "got shapes \\(2,\\) and \\(3,\\)"),
    ],
    ids=["one value", "unlike shapes"],
)
def test_what_is_no_loss_is_refused(result, message):
    with pytest.raises((TypeError, ValueError), match=message):
        summed(result, weighted_badly)


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_a_loss_may_leave_the_outputs_out_where_nothing_counts(weight):
    outputs = Outputs({"logits": torch.ones(2, requires_grad=True)})
    loss = OwnLoss(function=lambda outputs, batch: (torch.ones(()), weight), model=None)
    if weight:
        with pytest.raises(ValueError, match=r"does not depend on the model's outputs"):
            loss(outputs, {})
    else:
        loss(outputs, {})[0].backward()
        assert outputs.logits.grad.tolist() == [0.0, 0.0]


def weighted_badly(outputs, batch):
    """Has a name for messages."""


def on_rank_call_inside(folder, options, of_reference):
    setup = DistributedSetup.build(**options)
    model = SPECIMENS["llama"].load.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    other = DistributedSetup.build(**of_reference) if of_reference else setup
    called = SPECIMENS["llama"].load.from_pretrained(folder, distributed_setup=other, dtype=torch.float32)

    def close(outputs, batch):
        with torch.no_grad():
            before = called(input_ids=batch["input_ids"]).logits
        return (outputs.logits - before).square().mean(-1), torch.ones(before.shape[:2])

    setup.runtime(model, loss=close).forward_backward(rows_of_one_rank(0))


@pytest.mark.parametrize("reference", ["", "fsdp2", "tp", "cp"], ids="reference {}".format)
def test_a_loss_of_the_last_stage_may_not_wait_for_other_ranks(ranks, reference):
    """It may call neither the pipeline nor a reference that ranks of other stages would have to run too."""
    message = "a loss calls LlamaForCausalLM, which several ranks run together" if reference else "calls a pipeline"
    with pytest.raises(Exception, match=message):
        ranks(2).run(on_rank_call_inside, checkpoint("llama"), setups()["pp"][2], reference and setups()[reference][2])


def test_a_loss_of_the_last_stage_may_call_a_replica(ranks):
    ranks(2).run(on_rank_call_inside, checkpoint("llama"), setups()["pp"][2], {"strategy": "ddp"})


def on_rank_refusals(folder, options):
    setup = DistributedSetup.build(**options)
    model = SPECIMENS["llama"].load.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    said = []
    for loss in (DPO(), Contrastive(mesh=setup.mesh_context), "mean"):
        with pytest.raises((TypeError, ValueError)) as caught:
            setup.runtime(model, loss=loss)
        said.append(str(caught.value))
    return said


def test_a_loss_that_a_pipeline_would_cut_is_refused_before_the_first_step(ranks):
    for said in ranks(2).run(on_rank_refusals, checkpoint("llama"), setups()["pp"][2]):
        assert "takes 2 neighbouring rows together, and plugin 'pipeline' runs 1 at a time" in said[0]
        assert "compares all rows of a batch with each other" in said[1]
        assert "loss must be a function of the model's outputs and the batch" in said[2]
