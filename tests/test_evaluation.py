"""Evaluating a model on ranks is evaluating it on one process: the loss of all batches, and the outputs of one."""

import pytest
import torch
from cases import slow
from loss_runs import setups
from torch.nn.functional import cross_entropy, pad

from nemo_dist import DistributedSetup
from nemo_dist.losses import CrossEntropy
from nemo_dist.testing.equivalence import checkpoint
from nemo_dist.testing.tiny_models import SPECIMENS

COUNTS = (3, 2)  # batches of the data-parallel ranks


def batches_of(specimen, place):
    """Batches of unlike sizes, the last the smallest, with rows whose numbers of labels differ."""
    generator = torch.Generator().manual_seed(place)
    return [SPECIMENS[specimen].batch(rows, 12, generator) for rows in (4, 4, 3)[: COUNTS[place % 2]]]


def loaded(specimen, folder, options):
    setup = DistributedSetup.build(**options)
    return setup, SPECIMENS[specimen].load.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)


def on_rank_evaluate(specimen, folder, options, own):
    setup, model = loaded(specimen, folder, options)
    model.train()
    runtime = setup.runtime(model, loss=CrossEntropy() if own else None)
    loss = runtime.evaluate(batches_of(specimen, runtime.dp_rank))
    assert all(part.training for part in runtime.parts)
    assert not any(parameter.grad is not None for _, parameter in runtime.named_parameters())
    return loss.item(), runtime.dp_size


def expected_loss(specimen, places):
    """The sum of the losses of all labels over their number, by hand."""
    model = SPECIMENS[specimen].load.from_pretrained(checkpoint(specimen), dtype=torch.float32)
    total, count = 0.0, 0
    for place in range(places):
        for batch in batches_of(specimen, place):
            labels = batch["labels"][:, 1:]
            with torch.no_grad():
                logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
            total += cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100).item()
            count += (labels != -100).sum().item()
    return total / count


CELLS = [("fsdp2", False), *(slow(name, False) for name in setups() if name != "fsdp2"), ("pp", True), slow("cp", True)]


@pytest.mark.parametrize(("name", "own"), CELLS)
def test_evaluation_is_that_of_one_process(ranks, name, own):
    world, specimen, options = setups()[name]
    found = ranks(world).run(on_rank_evaluate, specimen, checkpoint(specimen), options, own)
    assert len({loss for loss, _ in found}) == 1
    assert found[0][0] == pytest.approx(expected_loss(specimen, found[0][1]), rel=1e-5)


def on_rank_forward(folder, options):
    setup, model = loaded("llama", folder, options)
    batch = batches_of("llama", 0)[0]
    return setup.runtime(model).forward(batch).logits


@pytest.mark.parametrize("name", [name if name == "pp" else slow(name) for name in ("cp", "pp", "tp", "pp x cp")])
def test_a_forward_gives_every_rank_whole_rows_and_whole_logits(ranks, name):
    world, _, options = setups()[name]
    model = SPECIMENS["llama"].load.from_pretrained(checkpoint("llama"), dtype=torch.float32)
    with torch.no_grad():
        expected = model(input_ids=batches_of("llama", 0)[0]["input_ids"]).logits
    for logits in ranks(world).run(on_rank_forward, checkpoint("llama"), options):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def on_rank_loop_by_hand(specimen, folder, options):
    setup, model = loaded(specimen, folder, options)
    model.config.output_router_logits = False  # a loop by hand is without the loss of routers
    runtime = setup.runtime(model)
    batch = batches_of(specimen, runtime.dp_rank)[0]
    expected = runtime.forward_backward(batch)
    norms = [runtime.clip_grad_norm_(1e9).item()]
    model.zero_grad()
    labels = batch.pop("labels")
    inputs = runtime.batch({**batch, "shift_labels": pad(labels, (0, 1), value=-100)[:, 1:]})
    labels = inputs.pop("shift_labels")
    total = cross_entropy(model(**inputs).logits.mT, labels, reduction="sum")
    (runtime.scale((labels != -100).sum()) * total).backward()
    norms.append(runtime.clip_grad_norm_(1e9).item())
    return norms, expected.item()


@pytest.mark.parametrize("name", ["fsdp2", *map(slow, ("cp", "tp", "ddp", "ep", "cp x tp"))])
def test_the_scale_of_a_loss_makes_a_loop_by_hand_exact(ranks, name):
    """Ranks have unlike numbers of labels, so the mean of their means is off."""
    world, specimen, options = setups()[name]
    for norms, _ in ranks(world).run(on_rank_loop_by_hand, specimen, checkpoint(specimen), options):
        assert norms[1] == pytest.approx(norms[0], rel=1e-5)


def on_rank_use_a_pipeline_like_a_model(source, options, folder):
    _, model = loaded("llama", source, options)
    assert model.eval() is model and not model.training
    assert model.train().training
    names = {name for name, _ in model.named_parameters()}
    assert names <= set(model.state_dict())
    assert len(list(model.modules())) > 1
    model.save_pretrained(folder)
    batch = batches_of("llama", 0)[0]
    with torch.no_grad():
        found = model(**batch)
    said = []
    for action in (lambda: model(**batch), lambda: model.generate(batch["input_ids"]), lambda: model.lm_head):
        with pytest.raises((ValueError, NotImplementedError, AttributeError)) as caught:
            action()
        said.append(str(caught.value))
    return found.loss.item(), found["logits"], sorted(names), said


def test_a_pipeline_behaves_like_the_model_that_it_stands_for(ranks, tmp_path):
    world, _, options = setups()["pp"]
    answers = ranks(world).run(on_rank_use_a_pipeline_like_a_model, checkpoint("llama"), options, tmp_path)
    model = SPECIMENS["llama"].load.from_pretrained(tmp_path, dtype=torch.float32)
    assert sorted(answers[0][2] + answers[1][2]) == sorted(name for name, _ in model.named_parameters())
    with torch.no_grad():
        expected = model(**batches_of("llama", 0)[0])
    for loss, logits, _, said in answers:
        assert loss == pytest.approx(expected.loss.item(), rel=1e-5)
        torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-5)
        assert "train with runtime.forward_backward(batch), or call the pipeline within torch.no_grad()" in said[0]
        assert "runtime.export(folder)" in said[1]
        assert "pipeline.parts are the stages of this rank" in said[2]
