"""Equal setups in one process share live groups, which are never those of a process group that has ended."""

import gc
import os
import subprocess
import sys
import textwrap
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nemo_dist import DistributedSetup, FSDP2Config, ParallelismSizes, initialize_distributed
from nemo_dist.mesh import rank_group, store_consensus
from nemo_dist.mesh.live_groups import live
from nemo_dist.mesh.mesh_context import flatten
from nemo_dist.mesh.rank_group import RankGroup
from nemo_dist.testing.pool import RankPool


def held():
    """Threads, descriptors and resident pages of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc/self/statm").exists() else 0
    threads = len(os.listdir("/proc/self/task")) if Path("/proc/self/task").exists() else threading.active_count()
    return threads, len(os.listdir("/dev/fd")), pages * 4096


def on_rank_build_many(count):
    def build():
        setup = DistributedSetup.build(
            strategy=FSDP2Config(), parallelism_sizes=ParallelismSizes(cp_size=2), timeout_minutes=1
        )
        total = torch.ones(1)
        dist.all_reduce(total, group=setup.mesh_context.group("cp"))
        return setup.mesh_context

    first = build()
    for _ in range(10):
        build()
    gc.collect()
    before = held()
    assert all(build() is first for _ in range(count))
    gc.collect()
    after = held()
    other = DistributedSetup.build(strategy=FSDP2Config(), timeout_minutes=1).mesh_context
    slower = DistributedSetup.build(parallelism_sizes=ParallelismSizes(cp_size=2), timeout_minutes=2).mesh_context
    assert other is not first and slower is not first
    return before, after


def test_a_hundred_setups_keep_threads_descriptors_and_memory_flat(ranks):
    for before, after in ranks(2).run(on_rank_build_many, 100):
        assert after[:2] == before[:2]
        assert after[2] - before[2] < 8 * 2**20


def on_rank_timeouts():
    """Return the timeout, in seconds, of the group of every axis and flattened name."""
    setup = DistributedSetup.build(parallelism_sizes=ParallelismSizes(tp_size=2, cp_size=2), timeout_minutes=0.5)
    mesh = setup.mesh_context
    groups = {name: flatten(mesh.device_mesh, axes, name).get_group() for name, axes in mesh.flattened.items()}
    groups |= {name: mesh.device_mesh[name].get_group() for name in mesh.device_mesh.mesh_dim_names}
    return {name: group._get_backend(torch.device("cpu")).options._timeout for name, group in groups.items()}


def test_the_timeout_of_a_setup_is_that_of_its_flattened_groups_too(ranks):
    for found in ranks(4).run(on_rank_timeouts):
        assert {"dp", "dp_shard_cp", "dp_cp", "cp"} <= found.keys()
        assert found == dict.fromkeys(found, timedelta(seconds=30))


def on_rank_timeouts_of_the_process_group():
    """Return the timeouts of the process group, and of groups over some of its ranks that are made later."""
    setup = DistributedSetup.build(parallelism_sizes=ParallelismSizes(tp_size=2, cp_size=2))
    groups = [dist.group.WORLD, setup.mesh_context.group("tp"), setup.mesh_context.group("cp")]
    some = DistributedSetup.build(ranks=[0, 1, 2]).mesh_context
    if some.holds_this_rank:
        groups.append(rank_group._group((0, 1, 2)))
    return [group._get_backend(torch.device("cpu")).options._timeout for group in groups]


def test_a_group_that_is_made_later_waits_as_long_as_the_process_group(ranks):
    for of_all, *of_some in ranks(4).run(on_rank_timeouts_of_the_process_group):
        assert set(of_some) == {of_all}


def on_rank_count_members(sets):
    """Return how many ranks each of several meshes has, of those that this rank is in."""
    meshes = [DistributedSetup.build(ranks=list(ranks)).mesh_context for ranks in sets]
    return [RankGroup.of(mesh).total([1])[0] for mesh in meshes if mesh.holds_this_rank]


def test_meshes_over_some_ranks_each_share_a_group_whatever_other_meshes_these_are_in(ranks):
    assert ranks(4).run(on_rank_count_members, ((0, 1, 2), (1, 3), (0, 3))) == [[3, 2], [3, 2], [3], [2, 2]]


ENDS = """
    import torch.distributed as dist
    from nemo_dist import DistributedSetup, initialize_distributed

    def mesh():
        initialize_distributed("gloo")
        return DistributedSetup.build(device_type="cpu").mesh_context

    first = mesh()
    assert mesh() is first
    dist.destroy_process_group()
    second = mesh()
    assert second is not first
    dist.all_reduce(__import__("torch").ones(1), group=second["dp"].get_group())
"""


def test_groups_of_a_destroyed_process_group_are_never_given_out(tmp_path):
    (tmp_path / "ends.py").write_text(textwrap.dedent(ENDS))
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    ended = subprocess.run([sys.executable, tmp_path / "ends.py"], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_ranks_of_a_pool_keep_groups_until_there_are_many_or_some_ranks_are_called_alone():
    with RankPool(2) as pool:
        assert pool.run(on_rank_count_kept) == [0, 0]
        pool.run(on_rank_build_many, 1)
        kept = pool.run(on_rank_count_kept)
        assert kept[0] == kept[1] > 0
        assert pool.run(on_rank_count_kept, ranks=[1]) == [0]
        assert pool.run(on_rank_count_kept) == [0, 0]


def on_rank_count_kept():
    return len(live._made)


def test_one_setting_is_the_patience_of_all_meetings(monkeypatch):
    monkeypatch.setattr(store_consensus, "_meetings", store_consensus._Meetings())
    assert store_consensus._meetings.patience == timedelta(minutes=30)
    store_consensus.set_patience(7)
    assert store_consensus._meetings.patience == timedelta(minutes=7)
    for wrong in (0, -1, True, "5", None, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="patience_minutes must be a positive number"):
            initialize_distributed("gloo", patience_minutes=wrong)
