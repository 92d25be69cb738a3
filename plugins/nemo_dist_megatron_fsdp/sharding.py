"""Shard a model with Megatron-FSDP: into even chunks while the weights are read, then into the package's buckets."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from megatron_fsdp import MixedPrecisionPolicy, fully_shard_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nemo_dist.errors import TopologyError
from nemo_dist.hf_model import blocks
from nemo_dist.mesh.dtensor import local, parameter_slots
from nemo_dist_megatron_fsdp.engine import Engine
from nemo_dist_megatron_fsdp.row_layout import RowLayout, even, even_rows, tensor_dim

if TYPE_CHECKING:
    from nemo_dist.mesh.mesh_context import MeshContext
    from nemo_dist_megatron_fsdp.config import MegatronFSDPConfig

_WHOLE = "_nemo_dist_megatron_fsdp_whole"  # the parameters on meta before sharding, kept until the weights are loaded


def refuse_device(mesh: MeshContext) -> None:
    """Raise RuntimeError where Megatron-FSDP cannot run: it calls torch.cuda by name."""
    try:
        torch.cuda.current_device()
    except (AssertionError, RuntimeError) as error:
        raise RuntimeError(
            f"strategy 'megatron_fsdp' needs CUDA, and this process has none ({error}); use 'fsdp2' here"
        ) from error
    if torch.cuda.is_available() and mesh.device.type != "cuda":
        raise RuntimeError(
            f"strategy 'megatron_fsdp' needs a mesh of CUDA devices (got {mesh.device.type!r}); initialise the process "
            "group with 'nccl', or use 'fsdp2'"
        )


def shard_evenly(model: nn.Module, mesh: MeshContext) -> None:
    """Shard every parameter of *model*, on meta, evenly over data-parallel ranks, so that only shards are read.

    Raises TopologyError with every parameter that cannot be sharded.
    """
    own_mesh = mesh["dp_shard_cp", "tp"]
    whole = dict(model.named_parameters())
    problems = [problem for name, parameter in whole.items() for problem in _problems(name, parameter)]
    if problems:
        raise TopologyError(problems)
    model.__dict__[_WHOLE] = whole
    ranks, rank = own_mesh.size(0), own_mesh.get_local_rank(0)
    shards: dict[int, nn.Parameter] = {}
    for _, module, name, parameter in parameter_slots(model):
        if id(parameter) not in shards:
            whole_rows = local(parameter)
            shard = even(parameter, whole_rows.split(even_rows(len(whole_rows), ranks))[rank], own_mesh)
            shards[id(parameter)] = nn.Parameter(shard, requires_grad=parameter.requires_grad)
        setattr(module, name, shards[id(parameter)])


def _problems(name: str, parameter: Tensor) -> list[str]:
    if isinstance(parameter, DTensor):
        return dim_problem(name, tuple(parameter.shape), tensor_dim(parameter), parameter.device_mesh.size())
    return dim_problem(name, tuple(parameter.shape), None, 1)


def dim_problem(name: str, shape: tuple[int, ...], dim: int | None, ranks: int) -> list[str]:
    """Say why a parameter of this *shape* cannot be sharded, of which *ranks* ranks have a part each along *dim*."""
    if not shape:
        return [f"{name} is a single number, which megatron_fsdp cannot shard; use 'ddp' for this model"]
    if 0 in shape:
        return [f"{name} has no elements, {shape}, and megatron_fsdp cannot shard it; use 'ddp' for this model"]
    if dim is not None and shape[dim] % ranks:
        return [
            f"dim {dim} of {name} has size {shape[dim]}, which megatron_fsdp needs as a multiple of the {ranks} "
            "tensor-parallel ranks; use another tp_size or 'fsdp2'"
        ]
    return []


def take_over(model: nn.Module, mesh: MeshContext, config: MegatronFSDPConfig) -> None:
    """Let Megatron-FSDP shard the loaded *model* in place; the model keeps its class.

    The package copies whole parameters into its buckets. To save memory it gets parameters without storage, and the
    weights are copied into its shards afterwards, one tensor at a time.
    """
    own_mesh = mesh["dp_shard_cp", "tp"]
    sources: dict[str, Any] = {name: parameter.detach() for name, parameter in model.named_parameters()}
    data, tensor = own_mesh.mesh_dim_names or ()
    units = unit_classes(model, config.megatron_fsdp_unit_modules)
    whole = model.__dict__.pop(_WHOLE)
    _replace_by_zeros(model, sources, whole)
    wrapper: Any = fully_shard_model(
        model,
        device_mesh=own_mesh,
        dp_shard_dim=data,
        tp_dim=tensor,
        expt_device_mesh=own_mesh,  # the package finds experts by name and shards them over this mesh
        device=mesh.device,
        fsdp_unit_modules=units,
        zero_dp_strategy=config.zero_dp_strategy,
        mixed_precision_policy=_precision(sources, config),
        overlap_param_gather=config.overlap_param_gather,
        overlap_grad_reduce=config.overlap_grad_reduce,
        disable_bucketing=config.disable_bucketing,
        fsdp_double_buffer=config.fsdp_double_buffer,
        report_nan_in_param_grad=config.report_nan_in_param_grad,
    )
    # Set here, because as an argument the package would ask for expert groups, which only Megatron-LM has.
    wrapper.ddp_config.average_in_collective = config.average_in_collective
    # Only NCCL can scale inside a reduction: scale before it on every backend, as the tests do.
    wrapper.ddp_config.gradient_reduce_div_fusion = False
    own: dict[str, Any] = dict(model.named_parameters())
    layout = RowLayout.of(own, whole, own_mesh)
    with torch.no_grad():
        for name in list(own):
            own[name].to_local().copy_(layout.own_part(name, sources.pop(name)))
    Engine.start(model, wrapper, layout)


def unit_classes(model: nn.Module, names: Collection[str] | None) -> list[type[nn.Module]]:
    """Return the classes of the units of *model*: those of these *names*, or the blocks that the model declares."""
    present = {type(module) for module in model.modules()}
    if names is None:
        found = {type(block) for block in blocks(model).values()}
    else:
        found = {cls for cls in present if {cls.__name__, f"{cls.__module__}.{cls.__qualname__}"} & set(names)}
        known = {name for cls in found for name in (cls.__name__, f"{cls.__module__}.{cls.__qualname__}")}
        missing = [name for name in names if name not in known]
        if missing:
            classes = ", ".join(sorted(cls.__name__ for cls in present))
            raise ValueError(f"megatron_fsdp_unit_modules names {missing}, which the model has not (it has {classes})")
    if not found:
        raise ValueError(
            f"{type(model).__name__} declares no blocks to gather; name their classes in megatron_fsdp_unit_modules"
        )
    return sorted(found, key=lambda cls: cls.__name__)


def _replace_by_zeros(model: nn.Module, sources: Mapping[str, Tensor], whole: Mapping[str, nn.Parameter]) -> None:
    """Replace the parameters by ones of their full data-parallel size without storage: one zero, expanded."""
    made: dict[int, nn.Parameter] = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for _, module, slot, parameter in parameter_slots(model):
        if id(parameter) not in made:
            name = names[id(parameter)]
            zero = torch.zeros((), dtype=sources[name].dtype, device=local(sources[name]).device)
            replaced = nn.Parameter(zero.expand(local(whole[name]).shape), requires_grad=parameter.requires_grad)
            _mark(replaced, whole[name])
            made[id(parameter)] = replaced
        setattr(module, slot, made[id(parameter)])


def _mark(parameter: nn.Parameter, whole: Tensor) -> None:
    """Mark how *parameter* is sharded over ``tp``, with Megatron-LM's attributes.

    A DTensor would say it too, but the package takes the row length of the global tensor, which is wrong for a
    parameter that is sharded along another dim than 0.
    """
    if isinstance(whole, DTensor):
        marks: Any = parameter
        marks.tensor_model_parallel, marks.partition_dim = True, tensor_dim(whole)


def _precision(sources: Mapping[str, Tensor], config: MegatronFSDPConfig) -> Any:
    """Return the package's policy; float32 parameters are their own main weights."""
    wide = all(tensor.dtype == torch.float32 for tensor in sources.values())
    reduced = torch.float32 if config.grad_reduce_in_fp32 else None
    return MixedPrecisionPolicy(
        main_params_dtype=torch.float32 if config.preserve_fp32_weights and not wide else None,
        # An optimizer needs gradients of its weights' dtype, so only float32 weights can have float32 gradients.
        main_grads_dtype=reduced if config.preserve_fp32_weights or wide else None,
        grad_comm_dtype=reduced,
    )
