"""What the checkpoint tests run on ranks: train, save, load, and report whole tensors."""

import json
import zlib

import torch
from torch.distributed.tensor import DTensor

from nemo_dist import DDPConfig, DistributedSetup, FSDP2Config, MegatronFSDPConfig, ParallelismSizes
from nemo_dist.canonical import exported, own_state
from nemo_dist.testing.equivalence import Task, checkpoint
from nemo_dist.testing.zoo import SPECIMENS

FP32 = {"param_dtype": "float32", "reduce_dtype": "float32", "output_dtype": "float32"}
OPTIMIZER = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-5}
FSDP2 = FSDP2Config(mp_policy=FP32)
INTERLEAVED = {"pp_schedule": "Interleaved1F1B"}
SETUPS = {
    "fsdp2": {"strategy": FSDP2},
    "hsdp": {"strategy": FSDP2, "parallelism_sizes": ParallelismSizes(dp_replicate_size=2)},
    "ddp": {"strategy": DDPConfig()},
    "tp": {"strategy": FSDP2, "parallelism_sizes": ParallelismSizes(tp_size=2)},
    "cp": {"strategy": FSDP2, "parallelism_sizes": ParallelismSizes(cp_size=2)},
    "pp": {"strategy": FSDP2, "parallelism_sizes": ParallelismSizes(pp_size=2), "pipeline_config": INTERLEAVED},
    "hsdp-tp": {"strategy": FSDP2, "parallelism_sizes": ParallelismSizes(dp_replicate_size=2, tp_size=2)},
    "ep": {"strategy": FSDP2, "parallelism_sizes": ParallelismSizes(ep_size=2)},
    "megatron": {"strategy": MegatronFSDPConfig()},
    "megatron-zero1": {"strategy": MegatronFSDPConfig(zero_dp_strategy=1)},
    "megatron-tp": {"strategy": MegatronFSDPConfig(), "parallelism_sizes": ParallelismSizes(tp_size=2)},
}


def start(name, specimen="llama", seed=0, **options):
    setup = DistributedSetup.build(**SETUPS[name])
    model = SPECIMENS[specimen].load.from_pretrained(
        checkpoint_of(specimen, seed), distributed_setup=setup, dtype=torch.float32
    )
    runtime = setup.runtime(model)
    return runtime, runtime.optimizer(torch.optim.AdamW, **OPTIMIZER)


FOLDERS = {}


def checkpoint_of(specimen, seed):
    return FOLDERS[specimen, seed]


def steps(runtime, optimizer, task, which):
    losses = []
    for step in which:
        batch = {name: value.chunk(runtime.dp_size)[runtime.dp_rank] for name, value in task.batches(step)[0].items()}
        losses.append(runtime.forward_backward(batch).item())
        runtime.clip_grad_norm_(0.5)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def whole(tensor):
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.detach().clone().cpu()


def everything(runtime, optimizer):
    """Return every parameter, and what the optimizer has of it, whole, by name."""
    own = own_state(runtime)
    found = {f"model/{name}": whole(tensor) for name, tensor in exported(runtime, own).items()}
    kinds = sorted({kind for state in optimizer.state.values() for kind in state})
    for kind in kinds:
        tensors = {n: optimizer.state[p][kind] for n, p in own.items() if kind in optimizer.state.get(p, {})}
        same = {n: t for n, t in tensors.items() if t.shape == own[n].shape}
        found |= {f"{kind}/{name}": whole(tensor) for name, tensor in exported(runtime, same).items()}
        found |= {f"{kind}/{name}": whole(tensor) for name, tensor in tensors.items() if name not in same}
    return found


def train_and_save(name, folders, path, specimen="llama", upto=3, **options):
    """Train from the start for *upto* steps, save, and report everything."""
    FOLDERS.update(folders)
    runtime, optimizer = start(name, specimen)
    task = Task(specimen=specimen)
    losses = steps(runtime, optimizer, task, range(upto))
    runtime.save(path, optimizer, extra={"step": upto, "losses": losses}, **options).wait()
    return everything(runtime, optimizer)


def load_and_report(name, folders, path, specimen="llama", seed=1, train=0):
    """Load into other weights, report everything, and train on from there."""
    FOLDERS.update(folders)
    runtime, optimizer = start(name, specimen, seed)
    extra = runtime.load(path, optimizer)
    found = everything(runtime, optimizer)
    losses = steps(runtime, optimizer, Task(specimen=specimen), range(extra["step"], extra["step"] + train))
    return extra, found, losses


def joined(outcomes):
    """Return what all ranks report together; what two of them hold must be equal."""
    result = {}
    for outcome in outcomes:
        for name, tensor in outcome.items():
            assert torch.equal(result.setdefault(name, tensor), tensor), name
    return result


def folders(*specimens):
    return {(specimen, seed): checkpoint(specimen, seed) for specimen in specimens for seed in (0, 1)}


def losses(name, folders, task, count):
    """Return the losses of *count* steps of a run that never stops."""
    FOLDERS.update(folders)
    runtime, optimizer = start(name, task.specimen)
    return steps(runtime, optimizer, task, range(count))


def rewrite(path, **changes):
    """Change the manifest as somebody would who also makes its checksum right."""
    content = json.loads((path / "manifest.json").read_text())
    content.pop("checksum")
    for name, change in changes.items():
        content[name] = change(content[name])
    text = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    (path / "manifest.json").write_text(json.dumps({**content, "checksum": zlib.crc32(text)}))
