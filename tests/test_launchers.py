"""Ranks join whatever launcher started them, or are refused in one sentence; they never train as many runs of one."""

import os
import socket
import subprocess
import sys
import textwrap
import threading
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cases import cases, slow

from nemo_dist import DistributedSetup, RankError, initialize_distributed
from nemo_dist.mesh.launch_env import LAUNCHERS, Launch, launched_world_size
from nemo_dist.mesh.process_group import choose_device
from nemo_dist.mesh.rendezvous import attempt, join

SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1"}
BATCH_JOB = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, (1, 2, 1)),
        (SLURM, (3, 8, 1)),
        (OPEN_MPI, (2, 4, 0)),
        (HYDRA, (1, 4, 1)),
        (SLURM | {"WORLD_SIZE": "8"}, (3, 8, 1)),
        ({"SLURM_PROCID": "0", "WORLD_SIZE": "2"}, (0, 2, None)),
        ({"SLURM_NTASKS": "8"}, None),  # a shell that salloc opened
        (OPEN_MPI | BATCH_JOB, (2, 4, 0)),
        (HYDRA | BATCH_JOB, (1, 4, 1)),
        ({"PMI_RANK": "1", "PMI_SIZE": "4"} | BATCH_JOB, (1, 4, None)),  # the job's local rank is not this rank's
        ({"PMI_RANK": "3", "PMI_SIZE": "8"} | SLURM, (3, 8, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8"} | SLURM, (3, 8, 1)),  # set by hand from Slurm's
        ({"RANK": "0", "WORLD_SIZE": "1"} | SLURM, (0, 1, None)),  # alone, on purpose
        ({"RANK": "5", "WORLD_SIZE": "16", "LOCAL_RANK": "5"} | BATCH_JOB, (5, 16, 5)),  # torchrun in a job
    ],
    ids=str,
)
def test_the_place_of_a_rank_is_what_its_launcher_says(environment, place):
    launch = Launch.read(environment)
    assert (launch and (launch.rank, launch.world_size, launch.local_rank)) == place
    assert launched_world_size(environment) == (place[1] if place else 1)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE is 8, but nothing says which rank this process is"),
        ({"RANK": "1"}, "RANK is 1, but WORLD_SIZE is not set"),
        ({"SLURM_PROCID": "1"}, "SLURM_PROCID is 1, but SLURM_NTASKS is not set"),
        (SLURM | {"WORLD_SIZE": "4"}, "WORLD_SIZE is 4, but the launcher started 8 ranks"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "there is no rank 2 of 2"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one' in the environment, which is no number from 0 up"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1'"),
        ({"RANK": "", "WORLD_SIZE": "2"}, "RANK is ''"),
    ],
    ids=str,
)
def test_contradictions_of_launchers_are_refused(environment, words):
    with pytest.raises(RankError, match=words):
        Launch.read(environment)


def test_a_setup_is_built_for_the_ranks_of_any_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert DistributedSetup.build().plan.world_size == 8


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT"])
@pytest.mark.parametrize("environment", [SLURM, OPEN_MPI, HYDRA], ids=lambda given: next(iter(given)))
def test_ranks_that_do_not_know_where_rank_0_is_are_refused(monkeypatch, environment, missing):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.delenv(missing)
    with pytest.raises(RankError, match=rf"this process is rank . of .*{missing} .*None.*scontrol show hostnames"):
        join(Launch.read(environment), timedelta(seconds=5))


@pytest.mark.parametrize("port", ["99999", "65536", "0", "²", "-1", "9" * 5000, " 29500", "1e3"])
def test_a_port_that_is_none_is_refused(monkeypatch, port):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", port)
    launch = Launch.read({"RANK": "1", "WORLD_SIZE": "2"})
    with pytest.raises(RankError, match=r"MASTER_PORT .* the port from 1 to 65535") as caught:
        join(launch, timedelta(seconds=1))
    assert len(str(caught.value)) < 800


@pytest.mark.parametrize("text", ["²", "9" * 5000, "99999999999", "-1", "", "1.0"])
def test_a_number_of_a_launcher_that_is_none_is_refused(text):
    with pytest.raises(RankError, match="which is no number from 0 up") as caught:
        Launch.read({"RANK": text, "WORLD_SIZE": "2"})
    assert len(str(caught.value)) < 300
    assert Launch.read({"RANK": "0" * 5000 + "1", "WORLD_SIZE": "2"}).rank == 1


@pytest.mark.parametrize("wrong", ["10", float("nan"), 1e30, 0, -1, None, True])
def test_a_timeout_that_is_no_number_of_minutes_is_refused(wrong):
    with pytest.raises(ValueError, match="timeout_minutes must be a positive number of minutes, at most a year"):
        initialize_distributed("gloo", timeout_minutes=wrong)
    assert not dist.is_initialized()


def test_a_rank_whose_peers_do_not_come_says_how_to_run_alone(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with pytest.raises(
        RankError, match=r"did not find the others at localhost:1 within .* set RANK=0 and WORLD_SIZE=1"
    ):
        join(Launch.read(SLURM), timedelta(seconds=1))


# ---- devices ----


def place(local_rank, world_size=8):
    return Launch(rank=3, world_size=world_size, local_rank=local_rank, told="a test")


@pytest.mark.parametrize(
    ("launch", "count", "index"),
    [
        (place(3), 8, 3),
        (place(3), 1, 0),  # the launcher shows each task one device
        (place(None), 1, 0),
        (place(None, world_size=1), 8, 0),
        (place(7), 8, 7),
    ],
)
def test_a_rank_takes_the_device_of_its_local_rank_or_the_only_one(launch, count, index):
    with mock.patch.object(torch.cuda, "device_count", return_value=count):
        assert choose_device(launch) == torch.device("cuda", index)


@pytest.mark.parametrize(
    ("launch", "count", "words"),
    [
        (place(4), 4, "has the local rank 4, but this process sees 4 CUDA devices"),
        (place(3), 2, "start at most one rank per device on a node"),
        (place(None), 8, "does not know which rank of its node it is"),
    ],
)
def test_a_rank_without_a_device_of_its_own_is_refused(launch, count, words):
    with mock.patch.object(torch.cuda, "device_count", return_value=count), pytest.raises(RankError, match=words):
        choose_device(launch)


# ---- attempts that share a store ----


def test_ranks_of_a_new_attempt_never_use_what_an_earlier_one_wrote():
    """Some ranks of the first attempts never come, and the ranks of the last come in any order, some of them late."""
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)

    def run(members, patience, late=()):
        names = {}

        def go(rank):
            store = dist.TCPStore("localhost", server.port, is_master=False, wait_for_workers=False)
            try:
                names[rank] = attempt(store, rank, 3, timedelta(seconds=patience))
            except dist.DistStoreError:
                names[rank] = None

        threads = [threading.Timer(0.5 if rank in late else 0, go, [rank]) for rank in members]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return names

    first = run([0, 1, 2], 20)
    assert len(set(first.values())) == 1 and first[0]
    assert run([0, 1], 1) == {0: None, 1: None}
    second, third = run([2, 1, 0], 20, late=[0]), run([0, 1, 2], 20, late=[2])
    for names in (second, third):
        assert len(set(names.values())) == 1 and names[0]
    assert len({first[0], second[0], third[0]}) == 3


# ---- real processes ----

JOIN = """
    import torch, torch.distributed as dist
    from nemo_dist import DistributedSetup, initialize_distributed
    env = initialize_distributed("gloo", timeout_minutes=1)
    total = torch.ones(1)
    dist.all_reduce(total)
    print(env.rank, env.world_size, env.local_rank, int(total), DistributedSetup.build().plan.world_size)
"""


@cases(("launcher",), [(LAUNCHERS[1],), *(slow(one) for one in LAUNCHERS[2:])], lambda launcher: launcher.name)
def test_processes_of_a_launcher_join_one_group(tmp_path, launcher):
    (tmp_path / "join.py").write_text(textwrap.dedent(JOIN))
    master, started = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}, []
    for rank in range(2):
        values = {launcher.rank: str(rank), launcher.world_size: "2", launcher.local_rank: str(rank)}
        command, environment = [sys.executable, tmp_path / "join.py"], clean() | master | values
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    lines = [process.communicate(timeout=240)[0].split() for process in started]
    assert lines == [["0", "2", "0", "2", "2"], ["1", "2", "1", "2", "2"]]


def clean():
    """The environment without what this process's own launcher may have set."""
    known = {name for launcher in LAUNCHERS for name in (launcher.rank, launcher.world_size, launcher.local_rank)}
    return {name: value for name, value in os.environ.items() if name not in known and "TORCHELASTIC" not in name}


def free_port():
    with socket.create_server(("localhost", 0)) as listener:
        return listener.getsockname()[1]
