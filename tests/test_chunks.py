"""The chunks that the ranks hold make up the whole tensor, whatever the layout."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from nemo_dist.checkpoint.chunks import Planner, assemble, chunks, described, survey
from nemo_dist.dry_run.imagined_world import imagined_world
from nemo_dist.errors import PluginError
from nemo_dist.mesh.rank_group import RankGroup

LAYOUTS = {
    "replicated": (Replicate(), Replicate()),
    "one axis": (Shard(0), Replicate()),
    "replicas of shards": (Replicate(), Shard(0)),
    "two dims": (Shard(1), Shard(0)),
    "one dim, twice": (Shard(0), Shard(0)),
    "from the right": (_StridedShard(0, split_factor=2), Shard(0)),
    "packed in two": (Replicate(), _StridedShard(0, split_factor=2)),
    "packed in three, and the other dim": (Shard(1), _StridedShard(0, split_factor=3)),
    "packed, then sharded": (_StridedShard(0, split_factor=2), _StridedShard(0, split_factor=2)),
    "the last dim": (Shard(-1), Replicate()),
}


def placed(shape, placements, mesh):
    """Return a counting tensor laid out by the placements' own splits, left to right."""
    local = torch.arange(torch.Size(shape).numel()).view(shape)
    for axis, placement in enumerate(placements):
        if hasattr(placement, "dim"):
            shards, _ = placement._split_tensor(local, mesh.size(axis), with_padding=False)
            local = shards[mesh.get_local_rank(axis)]
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local.contiguous(), mesh, placements, run_check=False, shape=shape, stride=stride)


def on_rank_bring_whole(shape, placements):
    mesh = init_device_mesh("cpu", (2, 2))
    state = {"weight": placed(torch.Size(shape), placements, mesh)}
    for chunk, values in chunks(state["weight"]):
        assert torch.equal(values, chunk.of(torch.arange(torch.Size(shape).numel()).view(shape)))
    assert described(state, RankGroup())["weight"].layout is not None
    _, entries = survey(RankGroup(), "test", lambda: state)
    wanted = [["weight"] if rank != 2 else [] for rank in range(4)]
    return assemble(RankGroup(), wanted, state, entries, {"weight": torch.int64}).get("weight")


def on_rank_find_the_chunks_of_odd_meshes():
    """A mesh in an order of its own, which strides describe, and pairs of ranks that they describe on two ranks."""
    pairs = DeviceMesh("cpu", torch.tensor([[0, 3], [1, 2]]), mesh_dim_names=("which", "pair"))["pair"]
    found = []
    for mesh, placements in (
        (DeviceMesh("cpu", torch.tensor([[0, 2], [1, 3]])), (Shard(0), Shard(1))),
        (pairs, (Shard(0),)),
    ):
        state = {"weight": placed(torch.Size((6, 4)), placements, mesh)}
        found.append(described(state, RankGroup())["weight"].layout is not None)
        _, entries = survey(RankGroup(), "test", lambda state=state: state)
        whole = assemble(RankGroup(), [["weight"]] * 4, state, entries, {"weight": torch.int64})["weight"]
        found.append(torch.equal(whole, torch.arange(24).view(6, 4)))
    return found


def test_a_mesh_of_any_order_is_described(ranks):
    answers = ranks(4).run(on_rank_find_the_chunks_of_odd_meshes)
    assert answers == [[True, True, rank in (0, 3), True] for rank in range(4)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(12, 4), (7, 5), (1, 3), (24, 2, 3)])
def test_the_pieces_of_any_layout_make_the_whole(ranks, layout, shape):
    results = ranks(4).run(on_rank_bring_whole, shape, LAYOUTS[layout])
    expected = torch.arange(torch.Size(shape).numel()).view(shape)
    assert results[2] is None
    for rank in (0, 1, 3):
        assert torch.equal(results[rank], expected)


def on_rank_bring_scalars():
    state = {"scalar": torch.tensor(3.0), "empty": torch.empty(0, 4)}
    _, entries = survey(RankGroup(), "test", lambda: state)
    dtypes = {name: tensor.dtype for name, tensor in state.items()}
    return assemble(RankGroup(), [["scalar", "empty"]] * 2, state, entries, dtypes)


def test_scalars_and_empty_tensors_are_exchanged_too(ranks):
    for found in ranks(2).run(on_rank_bring_scalars):
        assert torch.equal(found["scalar"], torch.tensor(3.0))
        assert found["empty"].shape == (0, 4)


def on_rank_survey(make):
    mesh = init_device_mesh("cpu", (2,))
    return survey(RankGroup(), "test", lambda: {"weight": make(mesh)})


def partial(mesh):
    return DTensor.from_local(torch.ones(4), mesh, [Partial()], run_check=False)


def holed(mesh):
    if dist.get_rank() == 0:
        return DTensor.from_local(torch.ones(2), mesh, [Shard(0)], run_check=False, shape=(4,), stride=(1,))
    return DTensor.from_local(torch.ones(0), mesh, [Shard(0)], run_check=False, shape=(4,), stride=(1,))


def of_another_shape(mesh):
    return torch.ones(3 + dist.get_rank())


def misdeclared(mesh):
    return DTensor.from_local(torch.ones(3), mesh, [Shard(0)], run_check=False, shape=(4,), stride=(1,))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial, "reduce it before it is saved"),
        (holed, "leave holes: 2 elements of 4"),
        (of_another_shape, "but float32"),
        (misdeclared, "should have 2 of dim 0"),
    ],
)
def test_a_tensor_that_does_not_match_its_layout_is_refused(ranks, make, message):
    with pytest.raises(Exception, match=message) as caught:
        ranks(2).run(on_rank_survey, make)
    assert PluginError.__name__ in str(caught.value)


def test_what_a_rank_holds_is_described_anew_when_anything_of_a_tensor_changes():
    """A planner keeps the last description; each of these states differs from the one before in one thing."""

    def sharded(placement, mesh, sizes=(8, 16), dtype=torch.float32):
        whole, local = torch.empty(32, 16, device="meta"), torch.empty(sizes, dtype=dtype, device="meta")
        return DTensor.from_local(local, mesh, [placement], run_check=False, shape=whole.shape, stride=whole.stride())

    with imagined_world(4, 1):
        mesh, pairs = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
        planner = Planner()
        states = [
            {"a": torch.empty(32, 16)},
            {"b": torch.empty(32, 16)},
            {"b": torch.empty(16, 32)},
            {"b": torch.empty(16, 32, dtype=torch.bfloat16)},
            {"b": torch.empty(16, 32, dtype=torch.bfloat16), "c": torch.empty(1)},
            {"b": sharded(Shard(0), mesh)},
            {"b": sharded(Shard(0), mesh, dtype=torch.bfloat16)},
            {"b": sharded(Shard(0), pairs["outer"], (16, 16), torch.bfloat16)},
            {"b": sharded(Shard(1), pairs["outer"], (32, 8), torch.bfloat16)},
            {"b": sharded(Replicate(), pairs["outer"], (32, 16), torch.bfloat16)},
        ]
        texts = [planner.describe(state, RankGroup()) for state in states]
        assert texts == [Planner().describe(state, RankGroup()) for state in states]
        assert len(set(texts)) == len(states)
        assert planner.describe(dict(states[-1]), RankGroup()) == texts[-1]
        with pytest.raises(PluginError, match="should have 16 of dim 0 on this rank, but has 9"):
            planner.describe({"b": sharded(Shard(0), pairs["outer"], (9, 16), torch.bfloat16)}, RankGroup())
