"""Layouts are integers that say what torch's placements do, and every rank plans from them what all others do too."""

import json
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import _StridedShard

from nemo_dist.checkpoint import holdings, stored_tensor
from nemo_dist.checkpoint.holdings import Held, Holding
from nemo_dist.checkpoint.layout import Chunk, Cut, Layout, Spread, whole_of
from nemo_dist.checkpoint.save_plan import SavePlan
from nemo_dist.checkpoint.stored_tensor import Computed, Listed, Stored
from nemo_dist.errors import PluginError


@st.composite
def layouts(draw, ndim, most=4):
    """Draw a layout over up to three axes of a mesh, innermost ones first, and the number of ranks of the mesh."""
    cuts, block = [], 1
    for _ in range(draw(st.integers(0, 3)) if ndim else 0):
        block *= draw(st.integers(1, 2))  # an axis that replicates
        parts = draw(st.integers(2, most))
        cuts.append(Cut(draw(st.integers(0, ndim - 1)), parts, block, draw(st.sampled_from((1, 1, 2, 3)))))
        block *= parts
    return Layout(tuple(draw(st.permutations(cuts)))), block * draw(st.integers(1, 2))


@st.composite
def tensors(draw):
    """Draw a shape, a layout and the number of ranks."""
    shape = tuple(draw(st.lists(st.integers(0, 13), max_size=3)))
    return shape, *draw(layouts(len(shape)))


def split_by_torch(shape, layout, rank):
    """Return the elements, by their index in the whole tensor, that *rank* gets from torch's placements."""
    local = torch.arange(math.prod(shape)).view(shape)
    for cut in layout.cuts:
        placement = Shard(cut.dim) if cut.factor == 1 else _StridedShard(cut.dim, split_factor=cut.factor)
        shards, _ = placement._split_tensor(local, cut.parts, with_padding=False)
        local = shards[rank // cut.stride % cut.parts]
    return local


@given(tensors())
def test_the_chunks_of_a_rank_are_what_torch_gives_it(drawn):
    shape, layout, ranks = drawn
    whole = torch.arange(math.prod(shape)).view(shape)
    for rank in range(ranks):
        local = split_by_torch(shape, layout, rank)
        found = layout.chunks_of(shape, rank)
        assert sum(chunk.numel for chunk, _ in found) == local.numel()
        for chunk, own in found:
            assert torch.equal(chunk.of(whole), own.of(local))


@st.composite
def parts_of(draw, shape):
    offsets = [draw(st.integers(0, max(0, size - 1))) for size in shape]
    return Chunk(tuple(offsets), tuple(draw(st.integers(0, n - a)) for a, n in zip(offsets, shape, strict=True)))


@given(st.data())
def test_the_chunks_that_meet_a_part_are_found_with_who_has_them(data):
    shape, layout, ranks = data.draw(tensors())
    wanted, spread = data.draw(parts_of(shape)), Spread(layout, 0, ranks)
    expected = {
        (chunk, rank)
        for rank in range(ranks)
        for chunk, _ in layout.chunks_of(shape, rank)
        if chunk.common(wanted) is not None
    }
    found = {
        (chunk, spread.rank_at(coordinates, replica))
        for coordinates, chunk in layout.meeting(shape, wanted)
        for replica in range(spread.replicas)
    }
    assert found == expected


@given(tensors(), st.integers(0, 3))
def test_replicas_are_counted_among_ranks_with_equal_chunks(drawn, blocks):
    _, layout, ranks = drawn
    spread = Spread(layout, blocks * ranks, (blocks + 1) * ranks)
    assert spread.fits
    for rank in range(spread.first, spread.stop):
        coordinates = [cut.coordinate(rank) for cut in layout.cuts]
        assert spread.rank_at(coordinates, spread.replica_of(rank)) == rank
        assert 0 <= spread.replica_of(rank) < spread.replicas


def test_ranks_that_are_no_whole_meshes_do_not_fit():
    layout = Layout((Cut(0, 2, 2),))
    assert Spread(layout, 4, 8).fits
    assert not Spread(layout, 2, 6).fits
    assert not Spread(layout, 0, 6).fits
    assert not Spread(Layout((Cut(0, 2, 2), Cut(0, 3, 3))), 0, 12).fits


@st.composite
def states(draw):
    """Draw what up to three stages hold, each of equally many ranks: layouts, chunks one by one, names in common."""
    ndim = draw(st.integers(0, 2))
    shapes = [tuple(draw(st.integers(0, 9)) for _ in range(ndim)) for _ in range(4)]
    found = [draw(layouts(ndim, most=3)) for _ in range(3)]
    world = math.lcm(*(ranks for _, ranks in found))
    assume(world <= 96)
    stages = []
    for stage in range(draw(st.integers(1, 3))):
        held = {}
        for index, shape in enumerate(shapes):
            common = draw(st.booleans())
            layout = found[index % len(found)][0]
            held[f"model/{index}" if common else f"model/{index}.{stage}"] = Held(shape, "float32", layout)
        stages.append(held)
    return [Holding([range(s * world, (s + 1) * world)], held) for s, held in enumerate(stages)]


def written(plans, name, shape):
    """Return how often each element of a tensor is written by all ranks together."""
    count = torch.zeros(shape, dtype=torch.int64)
    for plan in plans:
        for piece in plan.pieces:
            if piece.name == name:
                piece.chunk.of(count).add_(1)
    return count


def check_plans(stages):
    ranks = [rank for stage in stages for several in stage.ranks for rank in several]
    plans = [SavePlan.of(stages, rank) for rank in ranks]
    listed = json.loads(json.dumps(stored_tensor.to_json(plans[0].tensors)))
    read = stored_tensor.from_json(listed["layouts"], listed["tensors"])
    for rank, plan in zip(ranks, plans, strict=True):
        assert plan.tensors == plans[0].tensors
        (own,) = [stage.tensors for stage in stages if any(rank in several for several in stage.ranks)]
        for piece in plan.pieces:
            assert piece.chunk in own[piece.name].chunks_of(rank)
        for name, stored in read.items():
            mine = [piece.chunk for piece in plan.pieces if piece.name == name]
            assert sorted(map(repr, stored.in_file(rank))) == sorted(map(repr, mine))
    for name, stored in read.items():
        stored.where.check(name, stored.shape, len(ranks))
        assert torch.equal(written(plans, name, stored.shape), torch.ones(stored.shape, dtype=torch.int64))
    return plans


@given(states())
def test_every_element_is_written_once_by_a_rank_that_has_it(stages):
    check_plans(stages)


@given(states())
def test_what_the_ranks_hold_travels_as_text(stages):
    for stage in stages:
        text = json.dumps(holdings.to_json(stage.tensors))
        assert holdings.from_json(json.loads(text)) == stage.tensors


def listed(shape, chunk):
    return Held(shape, "float32", None, (chunk,) if chunk else ())


def test_chunks_of_no_regular_mesh_are_listed_one_by_one():
    """Three ranks have a row, two rows and none, as no mesh would cut them; two of them have the norm as well."""
    rows = [Chunk((0, 0), (1, 2)), Chunk((1, 0), (2, 2)), None]
    norm, of_two = Held((4,), "float32", Layout()), [True, False, True]
    stages = [
        Holding([range(r, r + 1)], {"model/w": listed((3, 2), row)} | ({"model/n": norm} if of_two[r] else {}))
        for r, row in enumerate(rows)
    ]
    plans = check_plans(stages)
    assert isinstance(plans[0].tensors["model/w"].where, Listed)


def test_a_state_that_only_some_ranks_have_is_planned_by_layout():
    """As with sharded optimizer states: each rank has the moments of other parameters, and all have the weights."""
    weights = {f"model/{i}": Held((4,), "float32", Layout()) for i in range(4)}
    stages = [
        Holding([range(r, r + 1)], weights | {f"optimizer.m/{i}": Held((4,), "float32", Layout()) for i in (r, r + 2)})
        for r in range(2)
    ]
    plans = check_plans(stages)
    assert all(isinstance(stored.where, Computed) for stored in plans[0].tensors.values())
    assert [len(plan.pieces) for plan in plans] == [4, 4]


def test_replicas_share_the_writing():
    held = {f"model/{i}": Held((8, 8), "float32", Layout((Cut(0, 2, 1),))) for i in range(8)}
    plans = check_plans([Holding([range(8)], held)])
    assert [len(plan.pieces) for plan in plans] == [2] * 8


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Held((5,), "float32", Layout()), r"float32 \[5\] on rank 1, but float32 \[4\] on another"),
        (Held((4,), "int64", Layout()), r"int64 \[4\] on rank 1, but float32"),
        (listed((4,), Chunk((0,), (2,))), "overlap: 6 elements of 4"),
    ],
)
def test_ranks_that_do_not_hold_one_tensor_together_are_refused(other, message):
    stages = [Holding([range(1)], {"w": Held((4,), "float32", Layout())}), Holding([range(1, 2)], {"w": other})]
    with pytest.raises(PluginError, match=message):
        SavePlan.of(stages, 0)


def test_a_hole_is_refused():
    stages = [Holding([range(2)], {"w": Held((4,), "float32", Layout((Cut(0, 2, 1),)))})]
    SavePlan.of(stages, 0)
    with pytest.raises(PluginError, match="leave holes: 2 elements of 4"):
        SavePlan.of([Holding([range(1)], stages[0].tensors)], 0)


def test_a_plan_of_many_ranks_says_no_more_than_one_of_few():
    def text(shards):
        layout = Layout((Cut(0, shards, 8), Cut(1, 8, 1)))
        held = {f"model/{i}": Held((53248, 16384), "bfloat16", layout) for i in range(100)}
        held |= {f"model/norm.{i}": Held((16384,), "bfloat16", Layout((Cut(0, shards, 8),))) for i in range(100)}
        plan = SavePlan.of([Holding([range(shards * 8)], held)], 5)
        return json.dumps(stored_tensor.to_json(plan.tensors))

    assert len(text(2048)) - len(text(8)) < 20  # longer numbers


@pytest.mark.parametrize(
    "where",
    [
        Computed(Spread(Layout((Cut(0, 2, 1),)), 0, 2), 1),  # there is one replica
        Computed(Spread(Layout((Cut(0, 2, 1),)), 0, 4), 0),  # of more ranks than files
        Computed(Spread(Layout((Cut(0, 2, 1),)), 1, 3), 0),
        Computed(Spread(Layout((Cut(1, 2, 1),)), 0, 2), 0),  # there is one dim
        Computed(Spread(Layout((Cut(0, 0, 1),)), 0, 2), 0),
        Computed(Spread(Layout((Cut(0, 2, 0),)), 0, 2), 0),
        Computed(Spread(Layout((Cut(0, 2, 1, 1 << 40),)), 0, 2), 0),
    ],
)
def test_a_layout_that_no_save_writes_is_refused(where):
    with pytest.raises(ValueError, match=r"outside the tensor or the files|more pieces than any tensor"):
        where.check("w", (4,), 2)


def test_stored_chunks_of_one_part_are_found():
    stored = Stored((4, 6), "float32", Computed(Spread(Layout((Cut(0, 2, 2), Cut(1, 2, 1))), 0, 4), 0))
    assert [(piece.file, piece.chunk.offsets) for piece in stored.meeting(Chunk((1, 2), (2, 3)))] == [
        *((0, (0, 0)), (1, (0, 3))),
        *((2, (2, 0)), (3, (2, 3))),
    ]
    assert sum(piece.chunk.numel for piece in stored.meeting(whole_of((4, 6)))) == 24
