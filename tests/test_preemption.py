"""A job that is told to end saves the same step on all ranks, and ends with a code that says: run me again."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time

from cases import cases, slow
from scripts import START
from test_launchers import clean, free_port

from nemo_dist import RunFolder
from nemo_dist.checkpoint.manifest import Manifest
from nemo_dist.checkpoint.preemption import CODE

TRAIN = (
    START
    + """
    env, runtime, optimizer = start()
    run, notes = RunFolder(sys.argv[1]), Path(sys.argv[2])
    found = run.resume(runtime, optimizer)
    print("resumed", found, flush=True)
    for step in range(found[0] + 1 if found else 1, 100_000):
        train(runtime, optimizer)
        if found:
            break
        run.save_if_preempted(runtime, optimizer, step=step, extra={"step": step}, grace_seconds=60)
        (notes / f"{env.rank}.new").write_text(str(os.getpid()))
        (notes / f"{env.rank}.new").rename(notes / f"{env.rank}.pid")
"""
)


def started(tmp_path, launched_by):
    script, notes = tmp_path / "train.py", tmp_path / "notes"
    script.write_text(textwrap.dedent(TRAIN))
    notes.mkdir(exist_ok=True)
    command, environment = [script, tmp_path / "run", notes], clean() | {"OMP_NUM_THREADS": "1"}
    if launched_by == "torchrun":
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        return [_process([*launcher, *command], environment)]
    master = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    places = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NTASKS": "2"} for rank in range(2)]
    return [_process(command, environment | master | place) for place in places]


def _process(arguments, environment):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *map(str, arguments)], env=environment, **pipes)


def training(tmp_path, processes):
    """Return the process ids of both ranks once they train."""
    deadline, notes = time.monotonic() + 240, tmp_path / "notes"
    while len(files := sorted(notes.glob("*.pid"))) < 2:
        assert time.monotonic() < deadline and all(one.poll() is None for one in processes), "the ranks did not train"
        time.sleep(0.05)
    return [int(file.read_text()) for file in files]


@cases(("told",), [slow("one rank of srun"), slow("the agent of torchrun")])
def test_ranks_save_one_step_and_end_with_the_code_to_run_again(tmp_path, told):
    processes = started(tmp_path, told.split()[-1])
    ranks = training(tmp_path, processes)
    os.kill(ranks[1] if told.startswith("one rank") else processes[0].pid, signal.SIGTERM)
    texts = [one.communicate(timeout=240)[0] for one in processes]
    if told.startswith("one rank"):
        assert [one.returncode for one in processes] == [CODE, CODE], texts
    else:  # torchrun has codes of its own
        assert processes[0].returncode != 0
    (step,) = RunFolder(tmp_path / "run").steps()
    assert f"saved step {step} in {tmp_path / 'run'}, as a signal asked the job to end" in "".join(texts)
    saved = Manifest.read(RunFolder(tmp_path / "run").latest())
    assert saved.about["extra"] == {"step": step} and len(saved.files) == 2

    again = started(tmp_path, told.split()[-1])
    text = "".join(one.communicate(timeout=240)[0] for one in again)
    assert not any(one.returncode for one in again), text
    found = re.findall(r"resumed \(\d+, {'step': \d+}\)", text)  # both may stand in one line
    assert found == [f"resumed ({step}, {{'step': {step}}})"] * 2, text


STUCK = """
    import multiprocessing, os, signal, sys, time
    from datetime import timedelta
    import torch.distributed as dist
    from nemo_dist.checkpoint.preemption import StopRequest

    def child():
        time.sleep(600)

    StopRequest().listen((signal.SIGTERM, signal.SIGUSR1), 1)
    worker = multiprocessing.get_context("fork").Process(target=child)
    worker.start()
    worker.terminate()
    worker.join(240)
    print(worker.exitcode, flush=True)
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    print("waiting", flush=True)
    store.wait(["never"], timedelta(seconds=600))
"""


def test_a_process_that_cannot_save_ends_when_the_grace_is_over(tmp_path):
    """The main thread never comes back from C++, as in a collective with a dead rank; children end as they would."""
    (tmp_path / "stuck.py").write_text(textwrap.dedent(STUCK))
    process = _process([tmp_path / "stuck.py"], clean())
    assert process.stdout.readline() == f"{-signal.SIGTERM}\n"
    assert process.stdout.readline() == "waiting\n"
    time.sleep(2)
    assert process.poll() is None, "the end of a child was taken for a signal of its own"
    process.send_signal(signal.SIGUSR1)
    text = process.communicate(timeout=240)[0]
    assert process.returncode == CODE, text
    assert "ended 1 s after SIGUSR1, before a save was done" in text
