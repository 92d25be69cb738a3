"""It passes the kit at cp 2, cuts labels after the shift, and refuses models and batches that it cannot split."""

import pytest
import torch
from hypothesis import given

from nemo_dist import DistributedSetup, FSDP2Config, ParallelismSizes, TopologyError
from nemo_dist.testing import PluginConformance, strategies
from nemo_dist.testing.comm_recorder import assert_no_deadlock
from nemo_dist.testing.equivalence import Task, assert_equivalent, checkpoint
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.resume import assert_resumes
from nemo_dist.testing.tensors import of_batch
from nemo_dist.testing.tiny_models import SPECIMENS
from nemo_dist_ulysses.batch import part_of

TWO = {
    "strategy": FSDP2Config(mp_policy=FP32),
    "plugins": ("ulysses",),
    "parallelism_sizes": ParallelismSizes(cp_size=2),
}


class TestUlysses(PluginConformance):
    plugin = "ulysses"
    build = TWO


def test_a_run_that_stops_twice_goes_on_as_if_it_had_not(ranks):
    assert_resumes(ranks(2), **TWO)


def test_it_trains_with_recomputed_layers_and_a_length_that_does_not_divide(ranks):
    assert_equivalent(ranks(2), Task(length=11), **TWO, activation_checkpointing=True)


def test_no_rank_waits_for_ever_on_nccl(ranks):
    assert_no_deadlock(ranks(2), Task(), **TWO)


@given(batch=strategies.batches(padded=False, packed=False))
def test_the_parts_of_a_batch_hold_every_token_once_with_the_label_that_follows_it(batch):
    whole = of_batch(batch)
    length = whole["input_ids"].shape[1]
    parts = [part_of(whole, 3, rank) for rank in range(3)]
    joined = {name: torch.cat([part[name] for part in parts], dim=1)[:, :length] for name in whole}
    assert torch.equal(joined["input_ids"], whole["input_ids"])
    assert torch.equal(joined["labels"][:, :-1], whole["labels"][:, 1:])
    assert (joined["labels"][:, -1] == -100).all()


def test_a_row_with_padding_is_refused():
    batch = {"input_ids": torch.ones(2, 4), "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])}
    with pytest.raises(ValueError, match="ulysses splits rows without padding"):
        part_of(batch, 2, 0)


def on_rank_load(specimen, folder):
    setup = DistributedSetup.build(**TWO)
    with pytest.raises(ValueError) as caught:
        SPECIMENS[specimen].load.from_pretrained(folder, distributed_setup=setup)
    return str(caught.value)


@pytest.mark.parametrize(
    ("specimen", "reason"),
    [
        ("llama-odd", "3 key heads cannot be shared by 2 ranks"),
        ("lfm2", "tokens depend on each other outside of attention"),
        ("bert-tokens", "it is no decoder of text alone"),
    ],
)
def test_a_model_that_would_not_be_exact_is_refused_before_its_weights_are_read(ranks, specimen, reason):
    for message in ranks(2).run(on_rank_load, specimen, checkpoint(specimen)):
        assert reason in message and "use cp_size=1" in message


def test_an_axis_that_it_is_not_proven_with_is_refused():
    sizes = ParallelismSizes(cp_size=2, tp_size=2)
    with pytest.raises(TopologyError, match="ulysses is not proven with tp_size 2"):
        DistributedSetup.build(plugins=("ulysses",), parallelism_sizes=sizes, world_size=4)
