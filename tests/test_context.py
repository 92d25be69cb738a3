"""The live mesh is the plan, realised: same axes, same groups, same sizes."""

import os
import subprocess
import sys

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from nemo_dist import DistributedSetup, MeshContext, ParallelismSizes, initialize_distributed


def on_rank_compare_with_plan(options):
    setup = DistributedSetup.build(**options)
    context, rank = setup.mesh_context, dist.get_rank()
    groups = {
        name: dist.get_process_group_ranks(context.device_mesh[name].get_group())
        for name in ("pp", "dp_replicate", "dp_shard", "cp", "tp", "dp", "dp_shard_cp", "dp_cp")
    }
    agree = all(tuple(ranks) == setup.plan.group_of(rank, name) for name, ranks in groups.items())
    sizes = (context.pp_size, context.dp_replicate_size, context.dp_shard_size, context.cp_size, context.tp_size)
    return agree, sizes, context.dp_size, context.ep_size, context.rank("dp"), context is setup.mesh_context


def test_the_live_mesh_has_the_axes_groups_and_sizes_of_the_plan(ranks):
    options = {"parallelism_sizes": ParallelismSizes(dp_replicate_size=2)}
    answers = ranks(4).run(on_rank_compare_with_plan, options)

    assert answers == [(True, (1, 2, 2, 1, 1), 4, 1, rank, True) for rank in range(4)]


def on_rank_look_up(shape, names):
    context = MeshContext.from_meshes(init_device_mesh("cpu", shape, mesh_dim_names=names))
    wanted = ("dp", "dp_shard", "dp_shard_cp", "dp_cp", "tp", "cp")
    return {name: context.size(name) for name in wanted}, context.group("cp") is None, context.dp_shard_size


@pytest.mark.parametrize(
    ("names", "sizes"),
    [
        (("dp", "tp"), {"dp": 2, "dp_shard": 2, "dp_shard_cp": 2, "dp_cp": 2, "tp": 2, "cp": 1}),
        (("tp", "dp_shard"), {"dp": 2, "dp_shard": 2, "dp_shard_cp": 2, "dp_cp": 2, "tp": 2, "cp": 1}),
    ],
)
def test_a_users_own_mesh_answers_to_the_planned_names(ranks, names, sizes):
    for found, alone, shards in ranks(4).run(on_rank_look_up, (2, 2), names):
        assert (found, alone, shards) == (sizes, True, 2)


def test_a_mesh_where_dp_is_named_twice_is_refused(ranks):
    kind, text = ranks(4).run(on_rank_name_dp_twice)[0]
    assert kind == "ValueError" and "'dp' stands for" in text


def on_rank_name_dp_twice():
    try:
        MeshContext.from_meshes(init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "dp_shard")))
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def on_rank_initialize():
    env = initialize_distributed("gloo")
    return env.rank, env.world_size, env.device.type, env.is_main, env.backend


def test_an_existing_process_group_is_reused(ranks):
    assert ranks(2).run(on_rank_initialize) == [(0, 2, "cpu", True, "gloo"), (1, 2, "cpu", False, "gloo")]


def test_a_process_without_a_launcher_is_a_world_of_one():
    code = "import nemo_dist; env = nemo_dist.initialize_distributed(); print(env.rank, env.world_size, env.is_main)"
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)

    assert result.stdout.split() == ["0", "1", "True"]


def test_nccl_without_cuda_says_to_use_gloo():
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA, where nccl is right")
    with pytest.raises(RuntimeError, match="needs CUDA, and this machine has none; use 'gloo'"):
        initialize_distributed("nccl")
