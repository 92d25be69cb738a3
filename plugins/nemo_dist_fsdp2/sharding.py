"""Apply ``fully_shard`` to the blocks, embedding and head of a transformers model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard

from nemo_dist import hf_model
from nemo_dist.errors import TopologyError
from nemo_dist.mesh.dtensor import parameter_slots
from nemo_dist.mesh.process_group import has_cpu_backend
from nemo_dist.planning.mesh_plan import Role
from nemo_dist.plugin.mixed_precision import mixed_precision
from nemo_dist.plugin.resharding import reshard_with
from nemo_dist.plugin.sharding_override import ShardingOverride, sharding_overrides
from nemo_dist.torch_private import in_backward
from nemo_dist.training.rehearsal import read_from_outside
from nemo_dist_fsdp2.buffers import follow_compute_dtype
from nemo_dist_fsdp2.compiled import compile_blocks
from nemo_dist_fsdp2.containers import keep_writes
from nemo_dist_fsdp2.dtypes import kept_in_float32
from nemo_dist_fsdp2.groups import groups_of, unreduced
from nemo_dist_fsdp2.inputs import cast_hidden_states, cast_inputs
from nemo_dist_fsdp2.lost_writes import refuse_lost_writes
from nemo_dist_fsdp2.policies import casts_all, in_float32, inside, offload
from nemo_dist_fsdp2.resharding import Resharding
from nemo_dist_fsdp2.unlike_ranks import Gradients

if TYPE_CHECKING:
    from nemo_dist.mesh.mesh_context import MeshContext
    from nemo_dist_fsdp2.config import FSDP2Config


def shard(model: nn.Module, mesh: MeshContext, config: FSDP2Config) -> None:
    """Shard *model* in place: a group per block, one for the embedding, one for norm and head, the root for the rest.

    A module that shares a parameter with another one (a tied embedding) stays in the root's group, which stays gathered
    from the first use to the last, so that the tied parameter has one shard and one gradient.
    """
    if problems := list(_problems(model)):
        raise TopologyError(problems)
    _straighten(model)
    policy = mixed_precision(config.mp_policy)
    kept = kept_in_float32(model, policy.param_dtype)
    # A module that computes in a dtype of its own hands that on, and the next group must cast it.
    own_dtypes = [module for module, own in sharding_overrides(model).items() if own.mp_policy is not None]
    all_inputs = casts_all(config.mp_policy)
    options: dict[str, Any] = {
        "mesh": data_mesh(mesh),
        "mp_policy": inside(policy, config.mp_policy),
        "offload_policy": offload(config.offload_policy),
        "ignored_params": kept or None,
    }
    precise = {**options, "mp_policy": in_float32(policy), "ignored_params": None}
    reshard = config.reshard_after_forward
    # A pipeline stage runs several forwards before the first backward: gather its blocks once for all of them.
    block_reshard = mesh.size(Role.LAYERS) == 1 if reshard is None else reshard
    _shard_placed(model, options, bool(block_reshard))
    # The embedding first: it may be in a block, around which some models call it (ModernVBERT).
    first, blocks, last = untied(model, embeddings(model), hf_model.blocks(model).values(), tail(model))
    for embedding in first:
        how = precise if kept.issuperset(embedding.parameters()) else options
        fully_shard(embedding, reshard_after_forward=block_reshard, **how)
    if config.enable_compile:
        compile_blocks(model, blocks)
    for block in blocks:
        how = precise if kept.issuperset(block.parameters()) else options
        fully_shard(block, reshard_after_forward=block_reshard, **how)
    # The backward starts where the forward ends, so freeing norm and head in between would only gather them twice.
    end = [module for module in last if not kept.issuperset(module.parameters())]
    if end:
        fully_shard(end, reshard_after_forward=bool(reshard), **options)
    root = policy if all_inputs else replace(policy, cast_forward_inputs=False)
    fully_shard(model, reshard_after_forward=bool(reshard), **options | {"mp_policy": root})
    if not all_inputs:
        cast_inputs(model, policy.param_dtype)
        for module in (*blocks, *tail(model)) if own_dtypes else ():
            if module not in own_dtypes and not kept.issuperset(module.parameters()):
                cast_hidden_states(module, policy.param_dtype)
    _shard_kept(model, kept, precise | {"reshard_after_forward": block_reshard})
    Gradients.watch(model, mesh)
    # Counts are no part of a graph, which a compiled block would leave.
    refuse_lost_writes(model, counted=hf_model.has_own_code(model) and not config.enable_compile)
    follow_compute_dtype(model, policy.param_dtype)
    if hf_model.has_own_code(model):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                keep_writes(module)
    _prefetch([block for block in blocks if isinstance(block, FSDPModule)], config)
    resharding = Resharding.of(model, compiled=config.enable_compile)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            _drop_unreduced(module, resharding)
    reshard_with(model, resharding, resharding.gather)
    if config.offload_policy is not None:
        wait_for_copies(model, mesh.device)


def _problems(model: nn.Module) -> Iterator[str]:
    for name, parameter in model.named_parameters():
        if parameter.ndim == 0:
            yield f"{name} is a single number, which fsdp2 cannot shard; give it the shape (1,), or use 'ddp'"
        elif parameter.numel() == 0:
            yield f"{name} has no elements, {tuple(parameter.shape)}, and fsdp2 cannot shard it; use 'ddp'"


def _straighten(model: nn.Module) -> None:
    """Replace parameters that are transposed or strided views, which FSDP2 refuses, by ones that are not."""
    made: dict[nn.Parameter, nn.Parameter] = {}  # one for all modules that share a parameter
    for _, module, name, parameter in parameter_slots(model):
        if not parameter.is_contiguous():
            if parameter not in made:
                made[parameter] = nn.Parameter(parameter.detach().contiguous(), parameter.requires_grad)
            setattr(module, name, made[parameter])


def wait_for_copies(model: nn.Module, device: torch.device) -> None:
    """Let who steps, loads or lists the shards of *model*, which are on the CPU, wait until *device* has read them.

    FSDP2 copies them to a CUDA device without waiting. A forward that no backward follows may be over for the host
    while copies for its last blocks have yet to begin, and would compute with what is written meanwhile.
    """
    if device.type == "cuda":
        reshard_with(model, partial(torch.cuda.synchronize, device))


def refuse_offload_without_cpu_backend() -> None:
    """Raise ValueError where the process group cannot reduce tensors on the CPU, as the norm of offloaded gradients."""
    if not has_cpu_backend():
        raise ValueError(
            "offload_policy keeps gradients on the CPU, and the process group has no backend there (only "
            f"{dist.get_backend_config()}); "
            "initialise it with initialize_distributed(), which takes gloo for the CPU and NCCL for CUDA"
        )


def described(model: nn.Module) -> str:
    """Return the classes of the modules that are gathered one by one, and how many of each there are."""
    sharded: list[nn.Module] = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not sharded:
        first, blocks, last = untied(model, embeddings(model), hf_model.blocks(model).values(), tail(model))
        sharded = [*blocks, *first, *last, model]
    names = Counter(map(hf_model.class_name, sharded))
    return ", ".join(f"{count} {name}" for name, count in names.items())


def _shard_placed(model: nn.Module, options: dict[str, Any], reshard: bool) -> None:
    """Shard the modules for which another plugin overrides how, before the blocks that contain them."""
    for module, override in sharding_overrides(model).items():
        own: dict[str, Any] = {"reshard_after_forward": reshard, "shard_placement_fn": _along(override, module)}
        if override.reshard_after_forward is not None:
            own["reshard_after_forward"] = override.reshard_after_forward
        if override.mp_policy is not None:
            own["mp_policy"] = mixed_precision(override.mp_policy)
        if override.mesh is not None:
            own["mesh"] = override.mesh
        placed = fully_shard(module, **{**options, **own})
        if override.mesh is None:
            continue
        if override.mesh.size(-1) > 1:
            # For a divisor other than the group size FSDP2 takes a premultiplied sum, which gloo lacks: divide the sum.
            placed.set_gradient_divide_factor(float(override.grad_divisor))
            placed.set_force_sum_reduction_for_comms(True)
        else:
            # A shard axis of one rank copies where others reduce, and there FSDP2 divides by its factor once more,
            # unless the gradient is reduced in float32 or bfloat16: divide afterwards.
            placed.set_gradient_divide_factor(1.0)
            placed.set_all_reduce_hook(partial(_divide, divisor=override.grad_divisor))


def _divide(gradients: Tensor, divisor: int) -> None:
    gradients.div_(divisor)


def _shard_kept(model: nn.Module, kept: set[nn.Parameter], options: dict[str, Any]) -> None:
    """Shard the parameters *kept* in float32, which all groups so far left out, each with the module that reads it.

    That is the module that owns it, or one around it whose code reads it. Raises TopologyError where that is a group
    of its own already, as a group has one dtype.
    """
    readers: dict[str, set[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter in kept:
            readers.setdefault(_reader(model, name.rpartition(".")[0]), set()).add(parameter)
    modules = {name: model.get_submodule(name) for name in readers}
    if problems := [
        f"{hf_model.class_name(module)} {name!r} has parameters that transformers keeps in float32 beside others; "
        "load it with dtype=torch.float32 and compute in that, mp_policy={'param_dtype': 'float32'}"
        for name, module in modules.items()
        if isinstance(module, FSDPModule)
    ]:
        raise TopologyError(problems)
    for name, module in modules.items():
        fully_shard(module, **options | {"ignored_params": set(module.parameters()) - readers[name]})


def _reader(model: nn.Module, name: str) -> str:
    """Return the innermost module, *name* or one around it, while whose forward the parameters of *name* are read."""
    kind: Any = hf_model.plain_class(model.get_submodule(name))
    runs = kind.forward is not nn.Module.forward
    if name and (not runs or hf_model.reads_values(model, name)):
        return _reader(model, name.rpartition(".")[0])
    return name


def _along(override: ShardingOverride, module: nn.Module) -> Callable[[nn.Parameter], Shard]:
    """Return the function by which ``fully_shard`` finds the dim to shard of every parameter of *module*."""
    dims = {parameter: override.dims.get(name, 0) for name, parameter in module.named_parameters()}
    return lambda parameter: Shard(dims[parameter])


def data_mesh(mesh: MeshContext) -> DeviceMesh:
    """Return the mesh to shard over: all ranks that see different tokens, with the replicas of HSDP as outer axis.

    Where no other axis shards the parameters the mesh is named "fsdp", by which PEFT tells a module that computes on
    whole, gathered parameters from one that computes on its shard.
    """
    replicas = "replicas" if mesh.size("replicas") > 1 else "dp_replicate"  # with axes of other plugins, or without
    if mesh.size(replicas) > 1:
        return mesh[replicas, "dp_shard_cp"]
    group = mesh.group("dp_shard_cp")
    if group is None or mesh.size("tp") > 1:
        return mesh["dp_shard_cp"]
    return DeviceMesh.from_group(group, mesh.device.type, mesh_dim_names=("fsdp",))


@contextmanager
def unsynchronised(parts: list[nn.Module]) -> Iterator[None]:
    """Within the context, accumulate whole local gradients instead of reducing them."""
    sharded = [part for part in parts if isinstance(part, FSDPModule)]
    for part in sharded:
        part.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        for part in sharded:
            part.set_requires_gradient_sync(True)


def _drop_unreduced(module: nn.Module, resharding: Resharding) -> None:
    """Let ``zero_grad`` of *module* drop gradients that wait to be reduced too, and those of shards while gathered."""
    found, own = module.zero_grad, groups_of(module)

    def zero_grad(set_to_none: bool = True) -> None:
        if not in_backward():
            resharding()
        found(set_to_none)
        shards = set(module.parameters())
        for shard, drop in unreduced(own).items():
            if shard in shards:  # a group may be of several modules
                drop()

    module.zero_grad = zero_grad  # type: ignore[method-assign]


def embeddings(model: Any) -> list[nn.Module]:
    """Return the input embedding of *model*, if it is a module."""
    embedding = hf_model.input_embedding(model)
    return [embedding] if isinstance(embedding, nn.Module) else []


def tail(model: Any) -> list[nn.Module]:
    """Return the modules at the end of the forward: final norm and output head, as transformers' plan names them."""
    plan = {name for name, style in (model.fsdp_plan or {}).items() if style == "keep_full_weight"}
    named = [module for name, module in model.named_modules() if name in plan]
    head = model.get_output_embeddings()
    return list(dict.fromkeys([*named, *([head] if isinstance(head, nn.Module) else [])]))


def untied(model: nn.Module, *kinds: Iterable[nn.Module]) -> list[list[nn.Module]]:
    """Return, for each of *kinds* of modules, those that can be groups of their own.

    Left out is what is sharded already or inside of an earlier kind, has no parameters, or has one that is used outside
    of it too. Another module shares it, or code elsewhere reads it by itself, as Gemma 4 does with the embedding of
    padding, or runs what is in the module without the module, or asks it for the dtype of the compute, which it has
    only while it is gathered.
    """
    names = {module: name for name, module in model.named_modules()}
    uses = _uses(model)
    taken = {inner for module in names if isinstance(module, FSDPModule) for inner in _modules(module)}
    outside = read_from_outside(model)

    def alone(module: nn.Module) -> bool:
        own, name = _uses(module), names.get(module, "")
        if not own or module in taken or any(uses[key] != count for key, count in own.items()):
            return False
        read = name in outside or hf_model.reads_weight(model, name)
        return not read and not hf_model.gives_dtype(model, name)

    found = []
    for modules in kinds:
        found.append(list(filter(alone, modules)))
        taken.update(inner for module in found[-1] for inner in module.modules())
    return found


def _uses(module: nn.Module) -> Counter[int]:
    """Count in how many places of *module* each parameter is; a module in several places is in all of them."""
    places = (place for _, place in module.named_modules(remove_duplicate=False))
    return Counter(id(parameter) for place in places for parameter in place.parameters(recurse=False))


def _prefetch(blocks: list[FSDPModule], config: FSDP2Config) -> None:
    """Gather blocks ahead, with the modules inside of them that are sharded apart (experts).

    FSDP2 gathers one ahead by itself: in the forward by a host that runs ahead of the device. Experts make it wait in
    every layer, to learn how many tokens go where, so where they are sharded apart the next block is named.
    """
    groups = [[module for module in _modules(block) if isinstance(module, FSDPModule)] for block in blocks]
    apart = any(len(group) > 1 for group in groups)
    for index, block in enumerate(blocks):
        ahead = groups[index + 1 : index + 1 + config.forward_prefetch_depth]
        behind = groups[max(0, index - config.backward_prefetch_depth) : index][::-1]
        if config.forward_prefetch_depth > 1 or apart:
            block.set_modules_to_forward_prefetch(list(chain(groups[index][1:], *ahead)))
        if config.backward_prefetch_depth > 1:
            block.set_modules_to_backward_prefetch(list(chain(*behind)))


def _modules(block: Any) -> list[nn.Module]:
    return list(block.modules())
