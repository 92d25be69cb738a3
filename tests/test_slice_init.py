"""Weights drawn slice by slice are the same for every topology, and distributed as transformers draws them."""

import math

import pytest
import torch
from cases import cases, slow
from hypothesis import given
from hypothesis import strategies as st
from setups import DATA_PARALLEL
from test_from_config import Odd
from torch import nn

from nemo_dist import DistributedSetup, FSDP2Config, NeMoAutoModelForCausalLM, ParallelismSizes
from nemo_dist.loading import slice_init
from nemo_dist.loading.counted_draws import Constant, Normal, TruncatedNormal, Uniform, draw
from nemo_dist.loading.slice_init import SliceInit, refuse_long_draws
from nemo_dist.testing.tensors import whole
from nemo_dist.testing.tiny_models import SPECIMENS

DRAWS = [Constant(0.5), Uniform(-1.0, 3.0), Normal(0.1, 0.02), TruncatedNormal(0.0, 0.02, -2.0, 2.0)]


def drawn(distribution, shape, box=None, key="a weight"):
    box = [(0, size) for size in shape] if box is None else box
    values = torch.empty([stop - start for start, stop in box])
    draw(distribution, key, values, shape, box)
    return values


@st.composite
def shapes_and_boxes(data):
    shape = data(st.lists(st.integers(1, 90), min_size=0, max_size=3))
    return shape, [tuple(sorted(data(st.tuples(st.integers(0, size), st.integers(0, size))))) for size in shape]


@given(shapes_and_boxes(), st.sampled_from(DRAWS))
def test_a_slice_of_a_draw_is_that_slice_of_the_whole(where, distribution):
    shape, box = where
    expected = drawn(distribution, shape)[tuple(slice(start, stop) for start, stop in box)]
    assert torch.equal(drawn(distribution, shape, box), expected)


def test_a_slice_that_is_computed_in_many_parts_is_that_slice_too():
    expected = drawn(Normal(), [300, 700])
    assert torch.equal(drawn(Normal(), [300, 700], [(7, 293), (0, 700)]), expected[7:293])
    assert torch.equal(drawn(Normal(), [300, 700], [(7, 293), (333, 691)]), expected[7:293, 333:691])


SIZE = 1 << 18


@pytest.mark.parametrize(
    ("distribution", "reference"),
    [
        (Normal(0.5, 0.02), lambda t: nn.init.normal_(t, 0.5, 0.02)),
        (Uniform(-0.3, 0.1), lambda t: nn.init.uniform_(t, -0.3, 0.1)),
        (TruncatedNormal(0.0, 1.0, -2.0, 2.0), lambda t: nn.init.trunc_normal_(t)),
        (TruncatedNormal(0.0, 0.02, -2.0, 2.0), lambda t: nn.init.trunc_normal_(t, std=0.02)),
        (TruncatedNormal(0.0, 1.0, 3.0, 5.0), lambda t: nn.init.trunc_normal_(t, 0.0, 1.0, 3.0, 5.0)),
        (TruncatedNormal(1.0, 2.0, -9.0, 0.5), lambda t: nn.init.trunc_normal_(t, 1.0, 2.0, -9.0, 0.5)),
    ],
    ids=lambda value: value.__class__.__name__ if callable(value) else str(value),
)
@pytest.mark.filterwarnings("ignore:mean is more than 2 std")
def test_draws_have_the_distribution_of_torch(distribution, reference):
    """The greatest distance of two empirical distributions of many values (Kolmogorov and Smirnov)."""
    torch.manual_seed(0)
    found, expected = drawn(distribution, [SIZE]).sort().values, reference(torch.empty(SIZE)).sort().values
    shares = torch.searchsorted(expected, found).double() / SIZE
    distance = (shares - torch.arange(SIZE).double() / SIZE).abs().max().item()
    assert distance < 1.95 * math.sqrt(2 / SIZE)  # a chance of one in a thousand, and the draws are fixed
    assert found.std().item() == pytest.approx(expected.std().item(), rel=1e-2)


def test_neighbours_other_names_and_other_seeds_are_independent():
    one, other = drawn(Normal(), [SIZE]), drawn(Normal(), [SIZE], key="another")
    for first, second in ((one, other), (one[:-1], one[1:]), (one[::2], one[1::2])):
        assert abs(torch.corrcoef(torch.stack((first, second)))[0, 1].item()) < 5 / math.sqrt(len(second))
    assert abs(one.pow(4).mean().item() - 3) < 0.05  # the tails of the normal distribution


def test_what_transformers_draws_is_drawn_by_slices():
    """That the weights of a real model are not repeated whole, which would cost every rank the whole model."""
    with SliceInit(0) as init:
        model = SPECIMENS["llama"].load.from_config(SPECIMENS["llama"].config())
    init.hollow(model)
    origins = {name: init._origin[name] for name, _ in model.named_parameters()}
    assert [name for name, one in origins.items() if one.is_meta and init._by_element(one) is None] == []
    assert sum(one.is_meta for one in origins.values()) >= 15


def filled(seed):
    with SliceInit(seed) as init:
        model = Odd()
    init.hollow(model)
    init.fill(model, torch.device("cpu"))
    return model


def test_what_is_no_single_draw_is_repeated_from_the_same_draws():
    state = torch.get_rng_state()
    model, again, other = filled(1), filled(1), filled(2)
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
        assert not torch.equal(parameter, other.get_parameter(name)), name
    assert torch.equal(model.copied * 2.0, model.large.t())
    assert torch.allclose(model.orthogonal @ model.orthogonal.t(), torch.eye(8), atol=1e-5)
    assert (model.cut[3:5] == 7.0).all() and model.cut[:3].abs().max() <= 0.1
    assert torch.equal(model.row.weight[0], torch.arange(6.0)) and not model.row.weight[3].any()
    assert torch.equal(model.cast, model.cast.bfloat16().float())
    assert abs(model.scaled.mean().item() - 1.0) < 0.1 and abs(model.scaled.std().item() - 0.5) < 0.05


def on_rank_build(specimen, options, init):
    torch.manual_seed(7)
    model = SPECIMENS[specimen].load.from_config(
        SPECIMENS[specimen].config(),
        distributed_setup=DistributedSetup.build(**options),
        dtype=torch.float32,
        init=init,
    )
    parts = getattr(model, "parts", [model])
    tensors = [pair for part in parts for pair in (*part.named_parameters(), *part.named_buffers())]
    return {name: whole(tensor) for name, tensor in tensors}, torch.rand(1).item()


LAYOUTS = DATA_PARALLEL | {
    "tp": {"strategy": FSDP2Config(), "parallelism_sizes": ParallelismSizes(tp_size=2)},
    "pp": {"strategy": FSDP2Config(), "parallelism_sizes": ParallelismSizes(pp_size=2)},
    "ep": {"strategy": FSDP2Config(), "parallelism_sizes": ParallelismSizes(ep_size=2)},
}
CELLS = [
    *(("llama-odd", 2, layout) for layout in ("fsdp2", "tp", "pp")),
    ("mixtral", 2, "ep"),
    slow("mixtral", 4, "tp"),
    slow("llama-odd", 4, "pp"),
    *(slow(specimen, 2, "fsdp2") for specimen in SPECIMENS if specimen != "llama-odd"),
]


@cases(("specimen", "world", "layout"), CELLS)
def test_every_topology_draws_the_same_slices(ranks, specimen, world, layout):
    ((expected, after),) = ranks(1).run(on_rank_build, specimen, DATA_PARALLEL["fsdp2"], "slices")
    seen = set()
    for tensors, then in ranks(world).run(on_rank_build, specimen, LAYOUTS[layout], "slices"):
        assert [name for name in tensors if not torch.equal(expected[name], tensors[name])] == []
        assert then == after
        seen |= tensors.keys()
    assert seen == expected.keys()


@pytest.mark.parametrize("specimen", ["llama", "bert-sequences", "mixtral"])
def test_slices_have_mean_and_variance_of_what_transformers_draws(ranks, specimen):
    ((expected, _),) = ranks(1).run(on_rank_build, specimen, DATA_PARALLEL["fsdp2"], "whole")
    ((found, _),) = ranks(1).run(on_rank_build, specimen, DATA_PARALLEL["fsdp2"], "slices")
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        if values.unique().numel() <= 2 or not values.is_floating_point():
            assert torch.equal(found[name], values), name
        else:
            spread = values.double().std().item()
            few = 6 / math.sqrt(values.numel())
            assert abs(found[name].double().std().item() - spread) < few * spread, name
            assert abs((found[name].double().mean() - values.double().mean()).item()) < 1.5 * few * spread, name


def test_drawing_every_weight_is_refused_with_its_time_where_it_takes_long(monkeypatch):
    monkeypatch.setattr(slice_init, "_seconds_per_draw", lambda: 1e-2)
    refuse_long_draws(lambda: nn.Linear(4, 4))
    words = r"draws 0\.0 billion numbers on every rank.* takes this one some 20 minutes; pass init='slices'"
    with pytest.raises(ValueError, match=words):
        refuse_long_draws(lambda: nn.Embedding(400, 300))


def test_a_way_to_draw_that_does_not_exist_or_needs_ranks_is_refused():
    config = SPECIMENS["llama"].config()
    with pytest.raises(ValueError, match="init must be one of 'whole', 'slices'"):
        NeMoAutoModelForCausalLM.from_config(config, init="fast")
    with pytest.raises(TypeError, match="init='slices' needs distributed_setup or device_mesh"):
        NeMoAutoModelForCausalLM.from_config(config, init="slices")
