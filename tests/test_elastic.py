"""A run whose rank dies is started again by torchrun, on one node or two, and goes on where it was, by itself."""

import os
import re
import signal
import subprocess
import sys
import textwrap

from cases import cases, slow
from test_docs import BLOCK, ROOT, code_of
from test_launchers import clean, free_port

from nemo_dist import RunFolder

# Runs before the script of the page: rank 1 dies in the sixth step of the first attempt, after the save of the fourth.
DIES = """
    import os, signal, time, torch
    attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
    taken, plain = float("-inf"), torch.optim.AdamW.step  # steps after the resume; the optimizer is tried out before
    def step(*args, **kwargs):
        global taken
        taken += 1
        if DIE and rank == 1 and taken == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*args, **kwargs)
    torch.optim.AdamW.step = step
    from nemo_dist import RunFolder
    resume = RunFolder.resume
    def told(*args, **kwargs):
        global taken
        taken = 0
        found = resume(*args, **kwargs)
        print(f"rank {rank} resumed {found}", flush=True)
        return found
    RunFolder.resume = told
    DIE = not os.path.exists("died")
    if rank == 1:
        open("died", "w").close()
"""


def script(folder):
    """Write the script of the page, with a rank that dies once."""
    match = next(BLOCK.finditer((ROOT / "docs" / "jobs.md").read_text()))
    (folder / "train.py").write_text(textwrap.dedent(DIES) + code_of(match))
    return "train.py"


def agents(nodes):
    """Return the command of the agent on each of *nodes*, which have one rank each, or two on one."""
    elastic = ["-m", "torch.distributed.run", "--max-restarts", "1", "--monitor-interval", "0.2"]
    if nodes == 1:
        return [[*elastic, "--standalone", "--nproc-per-node", "2"]]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}", "--rdzv-id", "run"]
    both = [*elastic, "--nnodes", "2", "--nproc-per-node", "1", *meeting, "--local-addr", "127.0.0.1"]
    return [both, both]


@cases(("nodes",), [slow(2), slow(1)], lambda nodes: f"{nodes} nodes")
def test_a_run_whose_rank_dies_resumes_by_itself_from_the_newest_checkpoint(tmp_path, nodes):
    name, environment = script(tmp_path), clean() | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    started = [
        subprocess.Popen(
            [sys.executable, *agent, name],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for agent in agents(nodes)
    ]
    try:
        texts = [one.communicate(timeout=280)[0] for one in started]
    finally:
        for one in started:
            if one.poll() is None:
                os.killpg(one.pid, signal.SIGKILL)
    assert [one.returncode for one in started] == [0] * len(started), "\n".join(texts)[-6000:]
    said = "\n".join(texts)
    resumed = sorted(re.findall(r"rank . resumed .*", said))
    expected = sorted(f"rank {rank} resumed {found}" for rank in (0, 1) for found in (None, (4, None)))
    assert resumed == expected, said[-6000:]
    assert RunFolder(tmp_path / "run").steps() == [4, 8]
