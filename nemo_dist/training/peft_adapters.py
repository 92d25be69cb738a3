"""Train parameters that were added to a model after loading, such as PEFT adapters, which no strategy shards.

They are small, so every rank keeps them whole; only their gradients are all-reduced. What ranks that hold parts of the
same matrices compute with them is the matter of the plugin of that axis.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from nemo_dist.checkpoint.sharded_model import ShardedModel
from nemo_dist.hf_model import inner_model, plain_class
from nemo_dist.mesh.dtensor import local, parameter_slots
from nemo_dist.mesh.mesh_context import MeshContext
from nemo_dist.mesh.rank_group import RankGroup
from nemo_dist.planning.mesh_plan import Role
from nemo_dist.plugin.hookspecs import RuntimePart
from nemo_dist.plugin.protocol import Plugin, Stage, claimants
from nemo_dist.plugin.registry import Registry
from nemo_dist.plugin.resharding import gathered
from nemo_dist.plugin.sharding_override import sharding_overrides
from nemo_dist.training.adapter_files import AdapterFiles, keeps_weights_of_the_model
from nemo_dist.training.dora_magnitudes import fill_magnitudes
from nemo_dist.training.gradient_average import GradientAverage, is_whole, together
from nemo_dist.training.token_rows import compute_beside

FEATURE = "adapters"  # what a plugin lists in ``composes_with`` when it is tested with them
NOT_AVERAGED = (
    "so no strategy averages their gradients over ranks; make them parameters of the model before "
    "setup.runtime(model), as in model.temperature = torch.nn.Parameter(torch.zeros(()))"
)
_LOADED = "loaded_by_nemo_dist"
_MADE_WHOLE = "adapters_made_beside_whole_weights"
_AVERAGE = "_nemo_dist_average_of_adapters"  # in the __dict__ of the first part
_KEPT_EQUAL = "kept_equal_by_nemo_dist"


def mark_loaded(parts: Iterable[nn.Module]) -> None:
    """Mark the parameters of *parts* as loaded, to distinguish them from parameters that are added later."""
    for part in parts:
        for parameter in part.parameters():
            setattr(parameter, _LOADED, True)


def add_adapters(
    model: Any,
    config: Any,
    mesh: MeshContext,
    plugins: Sequence[Plugin],
    sharded: Callable[[Sequence[nn.Module]], ShardedModel],
) -> Any:
    """Return the PEFT model of *model*; see :meth:`nemo_dist.DistributedSetup.add_adapters`.

    *sharded* says of parts what saving needs to know of them.
    """
    from nemo_dist.training.modules_in_place import refuse_modules

    _refuse_axes("adapters would be added", mesh, plugins)
    refuse_copies(config)
    _refuse_rows(config, mesh)
    refuse_own_forward(config, mesh)
    staged = not isinstance(model, nn.Module)
    refuse_modules(model.parts if staged else [model], config, RankGroup.of(mesh))
    if staged:
        model.replace_parts(partial(_adapted_stage, config=config, mesh=mesh))
        model.save_pretrained = AdapterFiles(sharded(model.parts), True, model.parts[0].save_pretrained)
        return model
    made = _adapted(model, config, mesh)
    if keeps_weights_of_the_model(config):
        made.save_pretrained = AdapterFiles(sharded([made]), False, made.save_pretrained)
    return made


def adapted_on_meta(model: Any, config: Any) -> Any:
    """Return the PEFT model of *model*, whole and on the meta device, with what ``add_adapters`` trains."""
    import peft

    from nemo_dist.training.modules_in_place import without_copies

    with without_copies(), torch.device("meta"):
        return peft.get_peft_model(model, copy.deepcopy(config))


def _adapted(model: nn.Module, config: Any, mesh: MeshContext) -> Any:
    import peft

    from nemo_dist.training.modules_in_place import without_copies

    # DoRA reads the weights that it stands beside; other kinds need no more than shapes.
    with without_copies(), _whole_shapes(model) if _sharing(mesh) else gathered([model]):
        made = peft.get_peft_model(model, config)
    if _sharing(mesh):
        fill_magnitudes(made, mesh.device)
    compute_beside(made)
    setattr(made, _MADE_WHOLE, True)
    # PEFT writes the name of the class, so that others can load the base model; a sharded one has another.
    made._get_base_model_class = lambda *_, **__: plain_class(inner_model(made))
    return made


def _adapted_stage(part: nn.Module, config: Any, mesh: MeshContext) -> Any:
    own = copy.deepcopy(config)  # PEFT puts the names of the modules that it found into it
    made = _adapted(part, own, mesh)
    own.target_modules = config.target_modules
    return made


def _sharing(mesh: MeshContext) -> list[str]:
    """Return the axes along which ranks hold different parts of the same matrices."""
    return [axis for axis in mesh.wide() if mesh.roles.get(axis, Role.TOKENS) & Role.PARAMETERS]


def _layers(mesh: MeshContext) -> list[str]:
    """Return the axes along which ranks hold different layers."""
    return [axis for axis in mesh.wide() if mesh.roles.get(axis) is Role.LAYERS]


@contextmanager
def _whole_shapes(model: nn.Module) -> Iterator[None]:
    """Within the context, shards have the shapes of the whole parameters, which PEFT goes by, and no values."""
    slots = [(module, name, shard) for _, module, name, shard in parameter_slots(model) if isinstance(shard, DTensor)]
    for module, name, shard in slots:
        shape_only = local(shard.detach()).new_zeros(()).expand(shard.shape)
        module._parameters[name] = nn.Parameter(shape_only, requires_grad=shard.requires_grad)
    try:
        yield
    finally:
        for module, name, shard in slots:
            stand_in = module._parameters[name]
            shard.requires_grad_(stand_in is not None and stand_in.requires_grad)
            module._parameters[name] = shard


def refuse_copies(config: Any) -> None:
    """Raise ValueError for adapters that copy or change the weights of the model, of which a rank has only shards."""
    start = getattr(config, "init_lora_weights", True)
    asked = {
        "target_parameters": getattr(config, "target_parameters", None),
        f"init_lora_weights={start!r}": not (isinstance(start, bool) or start == "gaussian"),
    }
    found = [name for name, value in asked.items() if value]
    if found:
        raise ValueError(
            f"{type(config).__name__} asks for {' and '.join(found)}, which copies or changes weights of the model, "
            "and a rank has only shards of those; leave it out, and target the modules by their names, or train whole "
            "modules by modules_to_save"
        )


def _refuse_rows(config: Any, mesh: MeshContext) -> None:
    """Raise ValueError for trainable rows of an embedding along axes that they are not proven with."""
    if getattr(config, "trainable_token_indices", None):
        for axis in _sharing(mesh) + _layers(mesh):
            raise ValueError(
                f"trainable_token_indices is not proven with {axis} (got {axis}_size={mesh.size(axis)}), leave it at "
                "1, or train the whole embedding by modules_to_save"
            )


def refuse_own_forward(config: Any, mesh: MeshContext) -> None:
    """Raise ValueError for adapters of a kind that changes the forward of the whole model, where a rank has a part.

    AdaLoRA adds a term of its adapters to the loss there, which such ranks would count otherwise, or not at all.
    """
    import peft
    from peft.tuners.tuners_utils import BaseTuner

    kind: Any = peft.PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type, BaseTuner)
    axes = [axis for axis in mesh.wide() if mesh.roles.get(axis, Role.BATCH) is not Role.BATCH]
    if axes and issubclass(kind, BaseTuner) and kind.forward is not BaseTuner.forward:
        raise ValueError(
            f"{type(config).__name__} changes the forward of the whole model, or its loss, which is not proven with "
            f"{axes[0]} (got {axes[0]}_size={mesh.size(axes[0])}); leave it at 1, or use LoraConfig"
        )


def _refuse_apart(parts: Iterable[nn.Module]) -> None:
    """Raise ValueError for DoRA beside an embedding that a rank has a shard of when its adapter runs."""
    for name, module in (item for part in parts for item in part.named_modules()):
        base: Any = getattr(module, "base_layer", None)
        dora: Mapping[str, bool] = getattr(module, "use_dora", None) or {}
        if isinstance(base, nn.Embedding) and isinstance(base.weight, DTensor) and any(dora.values()):
            raise ValueError(
                f"DoRA of {name} reads the whole embedding, of which a rank has a shard then; leave it out of "
                "target_modules, or use LoRA without use_dora"
            )


def refuse_prompts(part: nn.Module) -> None:
    """Raise ValueError for prompt-learning adapters, which add tokens, so that the loss averages over more labels."""
    config: Any = getattr(part, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        raise ValueError(
            f"{type(config).__name__} adds tokens of its own to every sequence, so ranks and batches cannot be "
            "weighted by their labels; use adapters within the model's layers, LoRA for one"
        )


def adapters(parts: Sequence[nn.Module], mesh: MeshContext, plugins: Sequence[Plugin]) -> dict[str, RuntimePart]:
    """Broadcast the parameters added to *parts* to all ranks, and average their gradients from now on.

    Those that are frozen now belong to them where others are trained, as ``set_adapter`` of PEFT thaws them later.
    Returns the runtime part that does so, or an empty dict when none that is trained was added or one rank sees all
    tokens. Collective over the mesh when something was added. Raises ValueError where such training is not tested
    against one process.
    """
    added = {
        name: parameter
        for part in parts
        for name, parameter in part.named_parameters()
        if not hasattr(parameter, _LOADED)
    }
    for parameter in added.values():
        if not isinstance(parameter, DTensor) and parameter.device != mesh.device:
            parameter.data = parameter.data.to(mesh.device)  # PEFT put it beside a shard, which may be offloaded
    if not any(parameter.requires_grad for parameter in added.values()):
        return {}
    _refuse(added, parts, mesh, plugins)
    _refuse_apart(parts)
    for part in parts:
        if (config := getattr(part, "active_peft_config", None)) is not None:
            refuse_own_forward(config, mesh)
    for parameter in added.values():
        setattr(parameter, _KEPT_EQUAL, True)
    group = mesh.group(Role.TOKENS)
    for same in (group, *map(mesh.group, _sharing(mesh))):
        if same is not None:
            together(list(added.values()), partial(dist.broadcast, group_src=0, group=same))
    if group is None or all(is_whole(inner_model(part)) for part in parts):
        return {}
    average: GradientAverage = vars(parts[0]).setdefault(_AVERAGE, GradientAverage((), group))  # of all runtimes
    average.parameters = list(added.values())
    if _layers(mesh):
        return {FEATURE: RuntimePart(after_backward=average.run)}  # an engine has a backward per microbatch
    average.start()
    return {FEATURE: RuntimePart(no_sync=average.unsynchronised, unreduced=average.unreduced)}


def is_averaged(parameter: object) -> bool:
    """Whether *parameter* was loaded, or found as an adapter, for some setup, whose strategy averages its gradients."""
    return hasattr(parameter, _LOADED) or hasattr(parameter, _KEPT_EQUAL)


def refuse_unaveraged(
    named: Iterable[tuple[str, nn.Parameter]], groups: Iterable[Mapping[str, Any]], mesh: MeshContext
) -> None:
    """Raise ValueError where *groups* have parameters that ranks would train apart.

    Those are parameters of the model, *named*, that ``adapters`` did not find as it was called, and those of something
    else (a loss, say), where ranks see different tokens or stages.
    """
    stepped = {id(parameter): parameter for group in groups for parameter in group["params"]}
    own = [(name, parameter) for name, parameter in named if stepped.pop(id(parameter), None) is not None]
    late = [name for name, parameter in own if not is_averaged(parameter)]
    if stepped and mesh.size(Role.TOKENS) * mesh.size(Role.LAYERS) > 1:
        shape = tuple(next(iter(stepped.values())).shape)
        raise ValueError(
            f"{len(stepped)} of the parameters are not the model's (the first is of shape {shape}), {NOT_AVERAGED}"
        )
    if late:
        raise ValueError(
            f"{len(late)} parameters were added to the model, or trained for the first time, after the runtime was "
            f"made ({late[0]}, ...), so ranks would train them apart; call setup.runtime(model) after that, and make "
            "the optimizer with the new runtime"
        )


def _refuse(
    added: dict[str, nn.Parameter], parts: Sequence[nn.Module], mesh: MeshContext, plugins: Sequence[Plugin]
) -> None:
    """Raise ValueError where not every rank has the whole layers that the *added* parameters stand beside.

    These are axes along which ranks hold different layers, or parts of the same matrices unless the plugin of the axis
    lists the feature, and modules that are sharded over a mesh of their own, such as experts. Also for a strategy that
    does not list the feature, and for added parameters that are DTensors.
    """
    some = f"{len(added)} trainable parameters were added after loading ({next(iter(added))}, ...)"
    _refuse_axes(some, mesh, plugins)
    replicas = [axis for axis in mesh.wide() if mesh.roles.get(axis) is Role.BATCH][:-1]
    if not all(hasattr(part, _MADE_WHOLE) for part in parts):
        for axes, why in (
            (_layers(mesh), "PEFT finds modules of other stages, too"),
            (_sharing(mesh) + replicas, "PEFT takes the shape of a shard for that of a weight"),
        ):
            if axes:
                raise ValueError(
                    f"{some}; with {axes[0]} (got {mesh.size(axes[0])}) {why}, so add adapters with "
                    f"setup.add_adapters(model, config), and other parameters where {axes[0]} is 1"
                )
    apart = {
        id(parameter)
        for part in parts
        for module, override in sharding_overrides(part).items()
        if override.mesh is not None
        for parameter in module.parameters()
    }
    shared = [name for name, parameter in added.items() if id(parameter) in apart]
    if shared:
        raise ValueError(
            f"{some}; {shared[0]} is in a module that ranks share by a mesh of its own; leave that one out"
        )
    strategy = next((plugin for plugin in plugins if plugin.stage == Stage.DATA), None)
    if strategy is not None and FEATURE not in strategy.composes_with:
        others = " or ".join(map(repr, Registry().composing(FEATURE)))
        raise ValueError(f"{some}; this is not proven with {strategy.name!r}, use {others}")
    if any(isinstance(parameter, DTensor) for parameter in added.values()):
        raise ValueError(
            f"{some} as DTensors, of which a rank has only a shard; add them as plain tensors, whole on every rank, "
            "and modules_to_save with setup.add_adapters(model, config), which trains the modules themselves"
        )


def _refuse_axes(some: str, mesh: MeshContext, plugins: Sequence[Plugin]) -> None:
    wide = mesh.wide()
    for axis in (axis for axis in wide if axis in mesh.roles):
        proven = any(FEATURE in plugin.composes_with for plugin in claimants(plugins, axis))
        if not mesh.roles[axis] & Role.TOKENS and not proven:
            raise ValueError(f"{some}; this is not proven with {axis} (got {axis}_size={wide[axis]}), leave it at 1")
