"""Importing and planning: CPU time of nemo_dist without torch, and of torch's own mesh on its fake process group.

CPU time (``process_time``) of new processes, which start with nothing imported; the interpreter's own start does not
count. The plan is asked for what a mesh holds: the coordinates of rank 0 and its group along every axis.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from figures import Figure

TITLE = "Import and plan, CPU time"
WORLDS = (64, 512, 4096, 16384)
LIMIT_MS = 150
_ENOUGH = 7  # samples of each
_LEAST = 3
_SECONDS = 60  # on a busy machine fewer samples are taken

_CLOCK = """
import json, sys
from time import process_time
def lap():
    global start
    took, start = 1e3 * (process_time() - start), process_time()
    return took
"""

# The whole of what a user's script does before it needs torch.
_START = """
start = process_time()
import nemo_dist
imported = lap()
registry = nemo_dist.Registry()
for name in registry:
    registry.load(name)
loaded = lap()
nemo_dist.DistributedSetup.build(world_size=16384)
built = lap()
print(json.dumps({"import": imported, "load": loaded, "build": built, "torch": "torch" in sys.modules}))
"""

_OURS = """
from nemo_dist import MeshPlan, ParallelismSizes
sizes = ParallelismSizes(pp_size=2, dp_replicate_size=2, cp_size=2, tp_size=2)
times = []
for world in WORLDS:
    start = process_time()
    plan = MeshPlan.resolve(sizes, world)
    plan.coordinates(0)
    for axis in (*plan.dense.names, *plan.dense.flattened):
        plan.group_of(0, axis)
    times.append(lap())
print(json.dumps(times))
"""

_PEER = """
start = process_time()
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
imported = lap()
times = []
for world in WORLDS:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    start = process_time()
    shape, names = (2, 2, world // 16, 2, 2), ("pp", "dp_replicate", "dp_shard", "cp", "tp")
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for parts, name in (((1, 2), "dp"), ((2, 3), "dp_shard_cp"), ((1, 2, 3), "dp_cp")):
        mesh[tuple(names[part] for part in parts)]._flatten(name)
    mesh.get_coordinate()
    times.append(lap())
    dist.destroy_process_group()
print(json.dumps([imported, *times]))
"""


def measure() -> Iterator[Figure]:
    """Yield the start of a script, then the plan at each world size, in milliseconds of CPU."""
    starts, ours, peer = [], [], []
    deadline = time.monotonic() + _SECONDS
    while len(starts) < (_ENOUGH if time.monotonic() < deadline else _LEAST):
        starts.append(_run(_START))
        ours.append(_run(_OURS))
        peer.append(_run(_PEER))
    if any(start["torch"] for start in starts):
        raise RuntimeError("planning imported torch")
    for step, what in (
        ("import", "import nemo_dist"),
        ("load", "load every plugin class"),
        ("build", "build, 16384 ranks"),
    ):
        yield Figure(what=what, unit="ms", ours=[start[step] for start in starts])
    yield Figure(
        what="the three together",
        unit="ms",
        ours=[start["import"] + start["load"] + start["build"] for start in starts],
        limit=LIMIT_MS,
    )
    yield Figure(
        what="imports and a mesh of 16384 ranks",
        unit="ms",
        ours=[start["import"] + start["load"] + start["build"] for start in starts],
        peer=[imported + times[-1] for imported, *times in peer],
        against="torch, fake group",
    )
    for index, world in enumerate(WORLDS):
        yield Figure(
            what=f"plan of {world} ranks",
            unit="ms",
            ours=[times[index] for times in ours],
            peer=[times[index] for _, *times in peer],
            against="init_device_mesh, fake group",
        )


def _run(program: str) -> Any:
    """Run *program* in a new interpreter and return what it printed."""
    source = _CLOCK + f"WORLDS = {WORLDS!r}\n" + program
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise RuntimeError(f"a measured process failed:\n{done.stderr}")
    return json.loads(done.stdout)
