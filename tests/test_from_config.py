"""A new model starts from the bits that one process with the same seed would draw, whatever the topology."""

import pytest
import torch
import transformers
from cases import cases, slow
from setups import DATA_PARALLEL
from torch import nn

from nemo_dist import DistributedSetup, ParallelismSizes
from nemo_dist.loading.deferred_init import DeferredInit
from nemo_dist.testing.equivalence import checkpoint
from nemo_dist.testing.tensors import whole
from nemo_dist.testing.tiny_models import SPECIMENS


def on_rank_build(specimen, options, seed_of_rank):
    rank = torch.distributed.get_rank()
    torch.manual_seed(seed_of_rank[rank])
    before = torch.get_rng_state()
    model = SPECIMENS[specimen].load.from_config(
        SPECIMENS[specimen].config(), distributed_setup=DistributedSetup.build(**options), dtype=torch.float32
    )
    tensors = {name: whole(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    moved = not torch.equal(before, torch.get_rng_state())
    return tensors, model.training, moved, torch.rand(1).item()


# What is drawn does not depend on the strategy, which only shards it: every model once, and under each strategy those
# with uneven shards and two towers.
ON_FOUR = ("llama-odd", "llava")
CELLS = [
    *((specimen, 2, "fsdp2") for specimen in SPECIMENS),
    *(
        (specimen, 4, strategy) if specimen in ON_FOUR else slow(specimen, 4, strategy)
        for specimen in SPECIMENS
        for strategy in DATA_PARALLEL
    ),
]


@cases(("specimen", "world", "strategy"), CELLS)
def test_from_config_draws_what_one_process_draws(ranks, specimen, world, strategy):
    torch.manual_seed(7)
    single = SPECIMENS[specimen].load.from_config(SPECIMENS[specimen].config(), dtype=torch.float32)
    next_draw = torch.rand(1).item()
    expected = dict([*single.named_parameters(), *single.named_buffers()])

    for tensors, training, _, then in ranks(world).run(on_rank_build, specimen, DATA_PARALLEL[strategy], [7] * world):
        assert training == single.training
        assert tensors.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(expected[name], tensors[name])] == []
        assert then == next_draw  # what is drawn next, dropout say, is that of one process too


def test_ranks_with_different_seeds_start_from_the_weights_of_rank_0(ranks):
    answers = ranks(2).run(on_rank_build, "llama", DATA_PARALLEL["ddp"], [7, 8])

    first, second = (tensors for tensors, *_ in answers)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [moved for _, _, moved, _ in answers] == [True, False]


def on_rank_load_with_a_new_head(folder, options):
    torch.manual_seed(5)
    model = SPECIMENS["bert-tokens"].load.from_pretrained(
        folder, distributed_setup=DistributedSetup.build(**options), num_labels=5, ignore_mismatched_sizes=True
    )
    return {name: whole(parameter) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("strategy", DATA_PARALLEL)
def test_missing_weights_are_drawn_as_on_one_process(ranks, strategy, tmp_path):
    transformers.BertModel.from_pretrained(checkpoint("bert-tokens")).save_pretrained(tmp_path)
    torch.manual_seed(5)
    single = SPECIMENS["bert-tokens"].load.from_pretrained(tmp_path, num_labels=5)
    expected = {name: parameter.detach() for name, parameter in single.named_parameters()}

    for tensors in ranks(4).run(on_rank_load_with_a_new_head, tmp_path, DATA_PARALLEL[strategy]):
        assert [name for name in expected if not torch.equal(expected[name], tensors[name])] == []


@pytest.mark.parametrize("strategy", DATA_PARALLEL)
def test_weights_of_another_shape_are_redrawn_as_on_one_process(ranks, strategy):
    folder = checkpoint("bert-tokens")  # with 3 labels; 5 rows on 4 ranks are 2, 2, 1, 0 and 3 are 1, 1, 1, 0
    torch.manual_seed(5)
    single = SPECIMENS["bert-tokens"].load.from_pretrained(folder, num_labels=5, ignore_mismatched_sizes=True)
    expected = {name: parameter.detach() for name, parameter in single.named_parameters()}

    for tensors in ranks(4).run(on_rank_load_with_a_new_head, folder, DATA_PARALLEL[strategy]):
        assert [name for name in expected if not torch.equal(expected[name], tensors[name])] == []


class Odd(nn.Module):
    """Initialise in every way that a model might."""

    def __init__(self):
        super().__init__()
        self.scaled = nn.Parameter(torch.empty(40, 50).normal_().mul_(0.5).add_(1.0))
        self.large = nn.Parameter(torch.randn(300, 300))
        self.copied = nn.Parameter(torch.empty(300, 300))
        self.orthogonal = nn.Parameter(torch.empty(8, 8))
        self.cut = nn.Parameter(torch.empty(16, 4))
        self.cast = nn.Parameter(torch.empty(8, 4).uniform_().to(torch.bfloat16).float())
        self.row = nn.Embedding(10, 6, padding_idx=3)
        with torch.no_grad():
            self.copied.copy_(self.large.t())
            self.large.mul_(2.0)  # after the copy was made
            nn.init.orthogonal_(self.orthogonal)
            nn.init.trunc_normal_(self.cut, std=0.3, a=-0.1, b=0.1)
            self.cut[3:5].fill_(7.0)
            self.row.weight.data[0] = torch.arange(6.0)


def test_deferred_initialisation_replays_views_copies_chains_and_casts():
    torch.manual_seed(3)
    expected = Odd()
    state = torch.get_rng_state()
    torch.manual_seed(3)
    with DeferredInit() as init:
        model = Odd()
    init.hollow(model)

    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.is_meta for parameter in model.parameters())
    init.fill(model, torch.device("cpu"))
    for name, parameter in expected.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def on_rank_build_twice():
    config = SPECIMENS["llama"].config()
    config._attn_implementation = "sdpa"
    before = config.to_dict()
    for _ in range(2):
        setup = DistributedSetup.build(parallelism_sizes=ParallelismSizes(cp_size=2))
        SPECIMENS["llama"].load.from_config(config, distributed_setup=setup)
    return config._attn_implementation, config.to_dict() == before


def test_a_config_can_make_two_models_and_stays_unchanged(ranks):
    assert ranks(2).run(on_rank_build_twice) == [("sdpa", True)] * 2
