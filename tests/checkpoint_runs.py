"""What the checkpoint tests run on ranks: train, save, load, and report whole tensors."""

import hashlib
import json

import torch

from nemo_dist import DDPConfig, DistributedSetup, FSDP2Config, MegatronFSDPConfig, ParallelismSizes
from nemo_dist.checkpoint.chunks import as_bytes
from nemo_dist.checkpoint.manifest import sealed
from nemo_dist.checkpoint.state_dict import exported, own_state
from nemo_dist.testing.equivalence import MAX_NORM, OPTIMIZER, Task, checkpoint
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.tensors import rows_of_rank, whole
from nemo_dist.testing.tiny_models import SPECIMENS

FSDP2 = FSDP2Config(mp_policy=FP32)
INTERLEAVED = {"pp_schedule": "Interleaved1F1B"}


def _sizes(schedule=INTERLEAVED, **sizes):
    pipeline = {"pipeline_config": schedule} if "pp_size" in sizes else {}
    return {"strategy": FSDP2, "parallelism_sizes": ParallelismSizes(**sizes), **pipeline}


SETUPS = {
    "fsdp2": _sizes(),
    "hsdp": _sizes(dp_replicate_size=2),
    "ddp": {"strategy": DDPConfig()},
    "tp": _sizes(tp_size=2),
    "cp": _sizes(cp_size=2),
    "pp": _sizes(pp_size=2),
    "pp-v": _sizes({"pp_schedule": "ZBVZeroBubble"}, pp_size=2),  # one rank has a tied weight twice
    "pp-tp": _sizes(pp_size=2, tp_size=2),
    "pp-cp": _sizes(pp_size=2, cp_size=2),
    "hsdp-tp": _sizes(dp_replicate_size=2, tp_size=2),
    "hsdp-cp": _sizes(dp_replicate_size=2, cp_size=2),
    "ep": _sizes(ep_size=2),
    "ep-tp": _sizes(ep_size=2, tp_size=2),
    "five": _sizes(pp_size=2, ep_size=2, tp_size=2, cp_size=2),
    "megatron": {"strategy": MegatronFSDPConfig()},
    "megatron-zero1": {"strategy": MegatronFSDPConfig(zero_dp_strategy=1)},
    "megatron-tp": {"strategy": MegatronFSDPConfig(), "parallelism_sizes": ParallelismSizes(tp_size=2)},
}


def start(name, specimen="llama", seed=0):
    runtime = started(name, specimen, checkpoint_of(specimen, seed))
    return runtime, runtime.optimizer(torch.optim.AdamW, **OPTIMIZER)


def started(name, specimen, folder):
    setup = DistributedSetup.build(**SETUPS[name])
    model = SPECIMENS[specimen].load.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    return setup.runtime(model)


FOLDERS = {}


def checkpoint_of(specimen, seed):
    return FOLDERS[specimen, seed]


def steps(runtime, optimizer, task, which):
    losses = []
    for step in which:
        losses.append(runtime.forward_backward(rows_of_rank(task.batches(step)[0], runtime)).item())
        runtime.clip_grad_norm_(MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def everything(runtime, optimizer=None):
    """Return every parameter, and what the optimizer has of it, whole, by name."""
    own = own_state(runtime.sharded)
    found = {f"model/{name}": whole(tensor) for name, tensor in exported(runtime.sharded, own).items()}
    state = {} if optimizer is None else optimizer.state
    for kind in sorted({kind for held in state.values() for kind in held}):
        tensors = {name: state[p][kind] for name, p in own.items() if kind in state.get(p, {})}
        same = {name: tensor for name, tensor in tensors.items() if tensor.shape == own[name].shape}
        found |= {f"{kind}/{name}": whole(tensor) for name, tensor in exported(runtime.sharded, same).items()}
        found |= {f"{kind}/{name}": whole(tensor) for name, tensor in tensors.items() if name not in same}
    return found


def on_rank_train_and_save(name, folders, path):
    """Train from the start for three steps, and save."""
    FOLDERS.update(folders)
    runtime, optimizer = start(name)
    steps(runtime, optimizer, Task(), range(3))
    runtime.save(path, optimizer, extra={"step": 3})


def export_of(path):
    return path.with_name(path.name + "-export")


def digests(found):
    """Return a digest of every tensor of *found*, with its dtype and shape: equal exactly where the bits are."""
    return {
        name: f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(as_bytes(tensor).numpy().tobytes()).hexdigest()}"
        for name, tensor in found.items()
    }


def on_rank_train_save_and_export(name, folders, specimen, path):
    """Train for three steps, save and export, train three more; return what was saved and the last losses."""
    FOLDERS.update(folders)
    runtime, optimizer = start(name, specimen)
    task = Task(specimen=specimen)
    steps(runtime, optimizer, task, range(3))
    runtime.save(path, optimizer, extra={"step": 3})
    runtime.export(export_of(path))
    found = digests(everything(runtime, optimizer))
    return found, steps(runtime, optimizer, task, range(3, 6))


def on_rank_load_each(name, folders, specimen, paths, export):
    """Go on from each of *paths*, one after the other, with what the one before left, and load *export*.

    Report as ``on_rank_train_save_and_export``, and the model of the export.
    """
    FOLDERS.update(folders)
    runtime, optimizer = start(name, specimen, seed=1)
    reports = []
    for path in paths:
        first = runtime.load(path, optimizer)["step"]
        found = digests(everything(runtime, optimizer))
        reports.append((found, steps(runtime, optimizer, Task(specimen=specimen), range(first, first + 3))))
    return reports, digests(everything(started(name, specimen, export)))


def joined(outcomes):
    """Return what all ranks report together; what two of them hold must be equal."""
    result = {}
    for outcome in outcomes:
        for name, value in outcome.items():
            assert result.setdefault(name, value) == value, f"{name} differs between ranks"
    return result


def folders(*specimens):
    return {(specimen, seed): checkpoint(specimen, seed) for specimen in specimens for seed in (0, 1)}


def rewrite(path, **changes):
    """Change the manifest as somebody would who also makes its checksum right."""
    content = json.loads((path / "manifest.json").read_text())
    content.pop("checksum")
    for name, change in changes.items():
        content[name] = change(content[name])
    (path / "manifest.json").write_bytes(sealed(content))
