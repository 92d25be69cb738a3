"""``device_mesh=``: the user's own mesh, whatever the order of its axes and the layout of its ranks."""

import pytest
import torch
from cases import slow
from torch.distributed.device_mesh import DeviceMesh

from nemo_dist import DistributedSetup, FSDP2Config, NeMoAutoModelForCausalLM, ParallelismSizes
from nemo_dist.testing.equivalence import Task, checkpoint, differences, merged, reference, train, trained

TASK = Task(specimen="llama-tied", length=13)


def on_rank_train_on_mesh(task, folder, layout, names):
    mesh = DeviceMesh("cpu", torch.tensor(layout), mesh_dim_names=names)
    model = NeMoAutoModelForCausalLM.from_pretrained(folder, device_mesh=mesh, dtype=torch.float32)
    return train(task, model.distributed_setup, model)


def on_mesh(ranks, layout, names):
    world = torch.tensor(layout).numel()
    return merged(ranks(world).run(on_rank_train_on_mesh, TASK, checkpoint(TASK.specimen), layout, names))


@pytest.mark.parametrize("layout", [[0, 1], [0, 1, 2, 3]])
def test_a_mesh_with_only_a_tp_axis_matches_one_process(ranks, layout):
    assert differences(on_mesh(ranks, layout, ("tp",)), reference(TASK)) == []


@pytest.mark.parametrize(
    ("layout", "names", "sizes"),
    [
        ([0, 1], ("dp",), {}),
        ([0, 1], ("dp_shard",), {}),
        ([[0, 1], [2, 3]], ("dp", "tp"), {"tp_size": 2}),
        ([[0, 2], [1, 3]], ("dp", "tp"), {"tp_size": 2}),
        ([[0, 1], [2, 3]], ("tp", "dp"), {"tp_size": 2}),
        ([[0, 2], [1, 3]], ("tp", "dp_shard"), {"tp_size": 2}),
        slow(
            [[[0, 1], [2, 3]], [[4, 5], [6, 7]]],
            ("dp_replicate", "dp_shard", "tp"),
            {"tp_size": 2, "dp_replicate_size": 2},
        ),
        slow(
            [[[0, 1], [2, 3]], [[4, 5], [6, 7]]],
            ("tp", "dp_replicate", "dp_shard"),
            {"tp_size": 2, "dp_replicate_size": 2},
        ),
    ],
)
def test_a_mesh_with_data_axes_trains_like_a_setup_of_its_sizes(ranks, layout, names, sizes):
    """The default computes in bfloat16, so the numbers are those of ``build``, and near those of one process."""
    world = torch.tensor(layout).numel()
    expected = trained(ranks(world), TASK, strategy=FSDP2Config(), parallelism_sizes=ParallelismSizes(**sizes))

    found = on_mesh(ranks, layout, names)
    assert differences(found, expected, tolerance=2e-3) == []
    assert differences(found, reference(TASK), tolerance=0.2) == []


def on_rank_place(layout, names):
    setup = DistributedSetup.from_mesh(DeviceMesh("cpu", torch.tensor(layout), mesh_dim_names=names))
    mesh = setup.mesh_context
    return mesh.rank("dp"), mesh.rank("tp"), setup.explain().splitlines()[-1]


def test_explain_says_where_a_rank_stands_in_the_user_s_mesh(ranks):
    answers = ranks(4).run(on_rank_place, [[0, 1], [2, 3]], ("tp", "dp"))

    assert [answer[:2] for answer in answers] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert answers[1][2] == "rank 1: dp 1, tp 0; reads the same batch as ranks [1, 3]"


def on_rank_refusal(layout, names):
    mesh = DeviceMesh("cpu", torch.tensor(layout), mesh_dim_names=names)
    with pytest.raises(ValueError) as caught:
        NeMoAutoModelForCausalLM.from_pretrained("nowhere", device_mesh=mesh)
    return str(caught.value)


@pytest.mark.parametrize(("layout", "names"), [([1, 0], ("tp",)), ([[2, 3], [0, 1]], ("dp", "tp"))])
def test_a_mesh_with_descending_ranks_is_refused(ranks, layout, names):
    """A process group orders its ranks by number, so that a rank would not be where the mesh says."""
    for message in ranks(torch.tensor(layout).numel()).run(on_rank_refusal, layout, names):
        assert f"descending order along {names[0]!r}" in message and "ascend along every axis" in message
