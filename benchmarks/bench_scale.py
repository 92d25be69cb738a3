"""Planning checkpoints of a Llama-405B with AdamW on up to 16,384 ranks, as one of them, in one process.

Every world is a new process on torch's fake process group, with the tensors of that rank on the meta device: FSDP2 over
tensor parallelism of 8. A first save is planned, a repeated one, and a load of the manifest that was written. What is
measured are the functions of a real save and load; the other ranks of a world say what this one says.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from figures import Figure

TITLE = "Planning checkpoints of Llama-405B with AdamW, fsdp x tp 8, one rank in one process"
WORLDS = (64, 512, 4096, 16384)
TP = 8
_HIDDEN, _INNER, _LAYERS, _VOCABULARY, _KEYS = 16384, 53248, 126, 128256, 1024
_SAMPLES = 3
_COLUMNS: dict[str, tuple[int, ...]] = {"dp_shard": (0, TP), "tp": (0,)}  # a strided shard over a shard
_ROWS: dict[str, tuple[int, ...]] = {"dp_shard": (0,), "tp": (1,)}
_LIMITS = {"save_planning_cpu_s": 2.0, "repeated_planning_cpu_s": 0.02, "exchanged_bytes": 1024.0}
_LIMITS |= {"manifest_bytes": 8e6, "load_planning_cpu_s": 2.0, "peak_rss_bytes": 500e6}
_SHOWN = {"manifest_bytes": ("MB", 1e6), "peak_rss_bytes": ("MB", 1e6), "exchanged_bytes": ("B", 1.0)}


def measure() -> Iterator[Figure]:
    """Yield what rank 0 and a rank in the middle of the largest world spend, and rank 0 of the smaller ones."""
    for world in WORLDS:
        for rank in (0, world // 2 + 3) if world == WORLDS[-1] else (0,):
            samples = [_run(world, rank) for _ in range(_SAMPLES)]
            for what in samples[0]:
                unit, scale = _SHOWN.get(what, ("ms", 1e-3))
                limit = _LIMITS.get(what)
                yield Figure(
                    what=f"{world} ranks, rank {rank}: {what.removesuffix('_cpu_s').removesuffix('_bytes')}",
                    unit=unit,
                    ours=[sample[what] / scale for sample in samples],
                    limit=None if limit is None else limit / scale,
                )


def _run(world: int, rank: int) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__)), str(world), str(rank)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise RuntimeError(f"a measured process failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def layers() -> dict[str, tuple[tuple[int, ...], dict[str, tuple[int, ...]]]]:
    """Return shape and placements of every parameter, by name."""
    norm: dict[str, tuple[int, ...]] = {"dp_shard": (0,)}
    of_layer = {
        "self_attn.q_proj": ((_HIDDEN, _HIDDEN), _COLUMNS),
        "self_attn.k_proj": ((_KEYS, _HIDDEN), _COLUMNS),
        "self_attn.v_proj": ((_KEYS, _HIDDEN), _COLUMNS),
        "self_attn.o_proj": ((_HIDDEN, _HIDDEN), _ROWS),
        "mlp.gate_proj": ((_INNER, _HIDDEN), _COLUMNS),
        "mlp.up_proj": ((_INNER, _HIDDEN), _COLUMNS),
        "mlp.down_proj": ((_HIDDEN, _INNER), _ROWS),
        "input_layernorm": ((_HIDDEN,), norm),
        "post_attention_layernorm": ((_HIDDEN,), norm),
    }
    found: dict[str, Any] = {"model.embed_tokens.weight": ((_VOCABULARY, _HIDDEN), _COLUMNS)}
    for layer in range(_LAYERS):
        found |= {f"model.layers.{layer}.{name}.weight": value for name, value in of_layer.items()}
    return found | {"model.norm.weight": ((_HIDDEN,), norm), "lm_head.weight": ((_VOCABULARY, _HIDDEN), _COLUMNS)}


def main(world: int, rank: int) -> None:
    """Print the cost for one rank of a world as JSON."""
    import attrs
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from nemo_dist import MeshPlan, ParallelismSizes
    from nemo_dist.checkpoint.planning_cost import Placed, held_of, planning_cost
    from nemo_dist.mesh.dtensor import from_local
    from nemo_dist.torch_private import StridedShard

    plan = MeshPlan.resolve(ParallelismSizes(tp_size=TP), world)
    dtypes = {"model": "bfloat16", "optimizer.exp_avg": "float32", "optimizer.exp_avg_sq": "float32"}
    stage = {
        f"{kind}/{name}": Placed(shape, dtype, placements)
        for kind, dtype in dtypes.items()
        for name, (shape, placements) in layers().items()
    }
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world // TP, TP), mesh_dim_names=("dp_shard", "tp"))
    state, held = {}, held_of(plan, stage)
    for name, tensor in stage.items():
        chosen = [
            (StridedShard(dim, split_factor=factor[0]) if factor else Shard(dim)) if placed else Replicate()
            for axis in ("dp_shard", "tp")
            for placed in [tensor.placements.get(axis)]
            for dim, *factor in [placed or (0,)]
        ]
        layout, like = held[name].layout, torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype), device="meta")
        own = () if layout is None else layout.chunks_of(tensor.shape, rank)
        ends = [[o + n for o, n in zip(c.offsets, c.sizes, strict=True)] for _, c in own]
        sizes = [max(end[dim] for end in ends) if ends else 0 for dim in range(len(tensor.shape))]
        state[name] = from_local(torch.empty(sizes, dtype=like.dtype, device="meta"), mesh, chosen, like)
    print(json.dumps(attrs.asdict(planning_cost(plan, [stage], rank, state))))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
