"""Batches of which only some have images: exact where ranks run the same modules, one clear error where they do not."""

import pytest
import torch
import torch.distributed as dist

from nemo_dist import DDPConfig, DistributedSetup, FSDP2Config, MegatronFSDPConfig
from nemo_dist.testing.equivalence import checkpoint
from nemo_dist.testing.fake_cuda import WithCudaCalls
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.tensors import whole
from nemo_dist.testing.tiny_models import SPECIMENS

STRATEGIES = {
    "fsdp2": FSDP2Config(mp_policy=FP32),
    "megatron_fsdp": MegatronFSDPConfig(),
    "ddp": DDPConfig(),
}
LLAVA = SPECIMENS["llava"]


def batch(seed, image):
    made = LLAVA.batch(2, 12, torch.Generator().manual_seed(seed))
    if not image:
        del made["pixel_values"]
        made["input_ids"][:, :4] = 1
    return made


def on_rank_gradients(strategy, folder, images):
    """Return loss and gradients of a step in which rank r gets one batch for each of images[r], or the error."""
    setup = DistributedSetup.build(strategy=STRATEGIES[strategy])
    runtime = setup.runtime(LLAVA.load.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32))
    rank = dist.get_rank()
    try:
        loss = runtime.forward_backward([batch(10 * rank + i, image) for i, image in enumerate(images[rank])])
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return loss.item(), {name: whole(p.grad) for name, p in runtime.named_parameters() if p.grad is not None}


def alone(images):
    """Return the same of one process that sees the batches of all ranks."""
    model = LLAVA.load.from_pretrained(checkpoint("llava"), dtype=torch.float32)
    batches = [batch(10 * rank + i, image) for rank, mine in enumerate(images) for i, image in enumerate(mine)]
    counts = [(one["labels"][:, 1:] != -100).sum() for one in batches]
    losses = [model(**one).loss * count / sum(counts) for one, count in zip(batches, counts, strict=True)]
    sum(losses).backward()
    return sum(losses).item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("strategy", "images"),
    [
        ("fsdp2", [[True, False], [True, False]]),  # the batch that reduces the gradients has none for the tower
        ("fsdp2", [[False], [False]]),
        ("ddp", [[True, False], [True, False]]),
        ("ddp", [[True], [False]]),
    ],
)
def test_a_tower_that_some_batches_skip_matches_one_process(ranks, strategy, images):
    expected_loss, expected = alone(images)

    for loss, found in ranks(2).run(on_rank_gradients, strategy, checkpoint("llava"), images):
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        zeros = {name for name in found.keys() - expected.keys() if not found[name].any()}
        assert found.keys() - zeros == expected.keys()
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() <= 1e-5 * max(gradient.norm(), 1e-2), name


ONE_SIDED = ([[True], [False]], ["pixel_values", "text only"])
OTHER_ORDER = ([[False, True], [True, False]], ["text only, then pixel_values", "pixel_values, then text only"])
FEWER = ([[True, True], [True]], ["pixel_values, then pixel_values", "pixel_values"])


@pytest.mark.parametrize(
    ("strategy", "images", "forms"),
    [
        ("fsdp2", *ONE_SIDED),
        ("fsdp2", *OTHER_ORDER),
        ("fsdp2", *FEWER),
        ("megatron_fsdp", *ONE_SIDED),
    ],
)
def test_ranks_with_and_without_images_are_refused_instead_of_hanging(ranks, strategy, images, forms):
    pool = WithCudaCalls(ranks(2)) if strategy == "megatron_fsdp" else ranks(2)

    for message, form in zip(pool.run(on_rank_gradients, strategy, checkpoint("llava"), images), forms, strict=True):
        assert message.startswith("RankError: the batches of different data-parallel ranks")
        assert f"this rank was given: {form}. Give every rank equally many batches" in message


def on_rank_look(how, folder, images):
    setup = DistributedSetup.build(strategy=STRATEGIES["fsdp2"])
    runtime = setup.runtime(LLAVA.load.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32))
    batches = [batch(index, image) for index, image in enumerate(images[dist.get_rank()])]
    try:
        runtime.evaluate([batches]) if how == "evaluate" else runtime.forward(batches[0])
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize(
    ("how", "images", "forms"), [("evaluate", *FEWER), ("evaluate", *ONE_SIDED), ("forward", *ONE_SIDED)]
)
def test_looking_at_unlike_batches_is_refused_instead_of_hanging(ranks, how, images, forms):
    for message, form in zip(ranks(2).run(on_rank_look, how, checkpoint("llava"), images), forms, strict=True):
        assert message.startswith("RankError: the batches of different data-parallel ranks")
        assert f"this rank was given: {form}. Give every rank equally many batches" in message
