"""Ranks whose loaders have different numbers of batches stop together, or go on with batches that do not count."""

import time
import warnings

import checkpoint_runs as runs
import pytest
import torch
from cases import cases, slow
from torch import nn

from nemo_dist import DistributedSetup, FSDP2Config, NeMoAutoModel, RankError
from nemo_dist.losses import DPO, Contrastive, CrossEntropy
from nemo_dist.testing.equivalence import MAX_NORM, OPTIMIZER, Task, checkpoint
from nemo_dist.testing.fake_cuda import WithCudaCalls
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.tensors import rows_of_rank
from nemo_dist.testing.tiny_models import SPECIMENS
from nemo_dist.training.router_aux_loss import COUNTED
from nemo_dist.training.uneven_batches import without_labels

TIED = {"model/lm_head.weight"}
COUNTS = (3, 2)  # batches of the two data-parallel ranks


def on_rank_train(name, folders, specimen, pad, accumulate=1, counts=COUNTS):
    """Train on as many batches as this rank's loader has; return losses, norms, weights and warnings."""
    runs.FOLDERS.update(folders)
    runtime, optimizer = runs.start(name, specimen)
    task = Task(specimen=specimen, rows=4, accumulate=accumulate)
    loader = [[rows_of_rank(batch, runtime) for batch in task.batches(step)] for step in range(counts[runtime.dp_rank])]
    losses, norms = [], []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batches in runtime.batches(loader if accumulate > 1 else [one for (one,) in loader], pad=pad):
            losses.append(runtime.forward_backward(batches).item())
            norms.append(runtime.clip_grad_norm_(MAX_NORM).item())
            optimizer.step()
            optimizer.zero_grad()
    said = [str(warning.message) for warning in caught if "the batches end here" in str(warning.message)]
    return losses, norms, runs.everything(runtime), said


def alone(specimen, steps, accumulate=1):
    """Train one process on what the ranks have together in each of *steps*: of the last, the first rank's half."""
    task = Task(specimen=specimen, rows=4, accumulate=accumulate)
    model = SPECIMENS[specimen].load.from_pretrained(checkpoint(specimen), dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIMIZER)
    losses, norms = [], []
    for step in range(steps):
        here = [{k: v if step < min(COUNTS) else v[:2] for k, v in one.items()} for one in task.batches(step)]
        loss = model(**{name: torch.cat([one[name] for one in here]) for name in here[0]}).loss
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms, dict(model.named_parameters(remove_duplicate=False))


def assert_equal_to(expected, answers):
    losses, norms, weights = expected
    for found_losses, found_norms, found, _ in answers:
        assert found_losses == pytest.approx(losses, rel=1e-5)
        assert found_norms == pytest.approx(norms, rel=1e-5)
        for name, value in found.items():
            wanted = weights[name.removeprefix("model/")]
            assert (value - wanted).norm() <= 1e-5 * wanted.norm(), name
    assert {name for *_, found, _ in answers for name in found} >= {f"model/{name}" for name in weights} - TIED


def pool_for(name, ranks):
    pool = ranks(4 if name == "pp" else 2)
    return WithCudaCalls(pool) if name == "megatron" else pool


# The pipeline has two stages on each of two ranks.
STRATEGIES = {"fsdp2": "llama", "ddp": "llama", "megatron": "llama", "pp": "llama-deep-tied"}


@cases(
    ("name", "specimen", "accumulate"),
    [(*pair, 1) for pair in STRATEGIES.items()] + [("fsdp2", "llama", 2), ("fsdp2", "mixtral", 1)],
    lambda name, specimen, accumulate: f"{name}, {specimen}, {accumulate} batches a step",
)
def test_padding_goes_on_and_counts_only_what_is_real(ranks, name, specimen, accumulate):
    answers = pool_for(name, ranks).run(on_rank_train, name, runs.folders(specimen), specimen, True, accumulate)
    assert_equal_to(alone(specimen, max(COUNTS), accumulate), answers)
    assert [said for *_, said in answers] == [[]] * len(answers)


LOSSES = {"dpo": DPO(), "cross entropy": CrossEntropy(label_smoothing=0.1)}


def on_rank_train_own(folder, specimen, loss, counts):
    """As above with a *loss* of the user's own; one rank gets what two have together in each step."""
    torch.manual_seed(0)
    setup = DistributedSetup.build(strategy=FSDP2Config(mp_policy=FP32))
    model = SPECIMENS[specimen].load.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    runtime = setup.runtime(model, loss=LOSSES[loss])
    task = Task(specimen=specimen, rows=4)
    loader = []
    for step in range(counts[runtime.dp_rank]):
        (batch,) = task.batches(step)
        batch["reference_scores"] = -torch.arange(4.0) * (step + 1)
        alone = runtime.dp_size == 1 and step >= min(COUNTS)
        loader.append({k: v[:2] for k, v in batch.items()} if alone else rows_of_rank(batch, runtime))
    found = []
    for batch in runtime.batches(loader, pad=True):
        found.append((runtime.forward_backward(batch).item(), runtime.clip_grad_norm_(1e9).item()))
        model.zero_grad()
    return found


@cases(("specimen", "loss"), [("mixtral", "cross entropy"), slow("llama", "dpo")])
def test_padding_does_not_count_in_a_loss_of_ones_own(ranks, specimen, loss):
    (expected,) = ranks(1).run(on_rank_train_own, checkpoint(specimen), specimen, loss, (max(COUNTS),))
    for found in ranks(2).run(on_rank_train_own, checkpoint(specimen), specimen, loss, COUNTS):
        assert torch.tensor(found).allclose(torch.tensor(expected), rtol=1e-5)


def on_rank_compare_rows(folder, counts):
    """Evaluate on as many batches as this rank has; one rank gets what two have together."""
    setup = DistributedSetup.build(strategy=FSDP2Config(mp_policy=FP32))
    model = NeMoAutoModel.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    runtime = setup.runtime(model, loss=Contrastive(mesh=setup.mesh_context))
    with pytest.raises(ValueError) as caught:
        runtime.batches([], pad=True)
    batches = [Task(rows=8).batches(step)[0] for step in range(counts[runtime.dp_rank])]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        loss = runtime.evaluate([rows_of_rank({"input_ids": one["input_ids"]}, runtime) for one in batches])
    return str(caught.value), loss.item(), [str(warning.message) for warning in warned]


def test_no_batch_is_made_up_where_all_rows_are_compared(ranks):
    ((_, expected, _),) = ranks(1).run(on_rank_compare_rows, checkpoint("llama"), (min(COUNTS),))
    for said, loss, warned in ranks(2).run(on_rank_compare_rows, checkpoint("llama"), COUNTS):
        assert "the loss compares all rows of all ranks, so no batch can be made up; leave out pad=True" in said
        assert loss == pytest.approx(expected, rel=1e-5)
        assert any("rank 1 had no more than 2 batches, and the others had more" in line for line in warned)


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_first_rank_without_a_batch_ends_the_loop_for_all(ranks, name):
    specimen = STRATEGIES[name]
    answers = pool_for(name, ranks).run(on_rank_train, name, runs.folders(specimen), specimen, False)
    assert_equal_to(alone(specimen, min(COUNTS)), answers)
    ended = {"fsdp2": "1", "ddp": "1", "megatron": "1", "pp": "1, 3"}[name]
    for *_, said in answers:
        assert len(said) == 1 and said[0].startswith(
            f"rank {ended} had no more than 2 batches, and the others had more"
        )


def test_equal_numbers_of_batches_end_without_a_word(ranks):
    for losses, *_, said in ranks(2).run(on_rank_train, "fsdp2", runs.folders("llama"), "llama", False, 1, (2, 2)):
        assert len(losses) == 2 and said == []


def on_rank_fail(folders, name, what):
    runs.FOLDERS.update(folders)
    runtime, _ = runs.start(name)
    rank = torch.distributed.get_rank()
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.long), "labels": torch.ones(1, 4, dtype=torch.long)}
    wide = {"input_ids": batch["input_ids"], "labels": torch.ones(1, 4)}

    def broken():
        yield batch
        if rank == 1:
            raise OSError("the file of rank 1 is gone")
        yield batch

    loaders = {
        "fails": broken(),
        "none at all": [batch, batch][: 2 - 2 * rank],
        "float labels": [wide, wide][rank:],
        "shared": [batch, batch][rank:],
    }
    start = time.monotonic()
    with pytest.raises((OSError, RankError, ValueError)) as caught:
        for _ in runtime.batches(loaders[what], pad=what != "fails"):
            pass
    return type(caught.value).__name__, str(caught.value), time.monotonic() - start


@cases(
    ("what", "name", "kinds", "words"),
    [
        ("fails", "fsdp2", ["RankError", "OSError"], "the file of rank 1 is gone"),
        ("none at all", "fsdp2", ["RankError", "ValueError"], "this rank's loader gave no batch at all"),
        ("float labels", "fsdp2", ["RankError", "ValueError"], "float labels cannot be left out of a loss"),
        ("shared", "tp", ["RankError", "RankError"], "data-parallel rank 0: rank [1] has no batch left, and rank [0]"),
    ],
    lambda what, *_: what,
)
def test_what_cannot_go_on_is_told_to_all_ranks(ranks, what, name, kinds, words):
    answers = ranks(2).run(on_rank_fail, runs.folders("llama"), name, what)
    assert [kind for kind, *_ in answers] == kinds
    for _, text, seconds in answers:
        assert words in text
        assert seconds < 50  # below the timeout of a collective


def test_a_copy_without_labels_counts_nothing():
    batch = {"input_ids": torch.ones(2, 3), "labels": torch.ones(2, 3, dtype=torch.long), "note": "kept"}
    first, second = without_labels([batch, {**batch, "shift_labels": batch["labels"]}])
    assert (first["labels"] == -100).all() and (second["shift_labels"] == -100).all()
    assert not first[COUNTED].any() and first[COUNTED].shape == (2, 3)
    assert first["note"] == "kept" and (batch["labels"] == 1).all()
