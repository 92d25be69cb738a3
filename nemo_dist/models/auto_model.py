"""Load a Hugging Face model sharded: build on meta, shard, read only the local slices, wrap."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import transformers
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel
from transformers.utils import find_adapter_config_file, is_peft_available

from nemo_dist.checkpoint.hf_export import export
from nemo_dist.checkpoint.hf_side_files import remember_origin
from nemo_dist.checkpoint.sharded_model import ShardedModel
from nemo_dist.errors import CheckpointError, RankError
from nemo_dist.hf_model import has_adapters, inner_model
from nemo_dist.loading.deferred_init import DeferredInit
from nemo_dist.loading.hf_weight_loader import Target, read_through
from nemo_dist.loading.missing_weights import Draws
from nemo_dist.loading.other_formats import damaged_index, unloadable
from nemo_dist.loading.same_source import config_fields
from nemo_dist.loading.slice_init import SliceInit, refuse_long_draws
from nemo_dist.mesh.mesh_context import MeshContext
from nemo_dist.mesh.process_group import made_on_cpu
from nemo_dist.mesh.store_consensus import brief, refuse_differences, reported, share_and_hear
from nemo_dist.models.other_loops import refuse_other_loops
from nemo_dist.planning.mesh_plan import Role
from nemo_dist.plugin.protocol import declared
from nemo_dist.setup.setup import DistributedSetup
from nemo_dist.training.loss_weighting import remember_loss
from nemo_dist.training.peft_adapters import mark_loaded

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_PLACE = ("cache_dir", "revision", "subfolder")  # keywords that say which files are meant by a name
_ACCESS = ("token", "local_files_only")
WHOLE, SLICES = "whole", "slices"  # how from_config draws
INITS = (WHOLE, SLICES)
_SIZES = "DistributedSetup.build(parallelism_sizes=ParallelismSizes({}=...))"
_MOVED = {
    "distributed_config": "DistributedSetup.build(strategy=...)",
    "moe_config": "DistributedSetup.build(moe_parallel_config=...)",
    "moe_parallel_config": "DistributedSetup.build(moe_parallel_config=...)",
    "moe_mesh": "DistributedSetup.build(parallelism_sizes=ParallelismSizes(ep_size=...))",
    "pipeline_config": "DistributedSetup.build(pipeline_config=...)",
    "tp_plan": "the config of the strategy or of the tp axis, DistributedSetup.build(strategy=...Config(tp_plan=...))",
    "activation_checkpointing": "DistributedSetup.build(activation_checkpointing=...)",
    "strategy": "DistributedSetup.build(strategy=...)",
    "parallelism_sizes": "DistributedSetup.build(parallelism_sizes=...)",
} | {name: _SIZES.format(name) for name in ("tp_size", "pp_size", "cp_size", "ep_size", "dp_size", "dp_replicate_size")}

# What NeMo's loaders take besides, and who does it here.
_ELSEWHERE = {
    "use_liger_kernel": "transformers' use_kernels=True, or leave it out",
    "use_sdpa_patching": "transformers' attn_implementation=",
    "sdpa_method": "torch.nn.attention.sdpa_kernel(...) around the step",
    "force_hf": "nothing, every model is transformers' own",
    "has_packed_sequence": "nothing, packed rows are found by their position_ids",
    "peft_config": "setup.add_adapters(model, peft_config) before setup.runtime(model)",
    "freeze_config": "parameter.requires_grad_(False) before setup.runtime(model)",
    "compile_config": "DistributedSetup.build(strategy=...Config(enable_compile=True))",
    "fp8_config": "nothing, training in FP8 is not supported",
    "qat_config": "nothing, quantization-aware training is not supported",
    "load_in_4bit": "nothing, weights that stay quantized cannot be sharded",
    "load_in_8bit": "nothing, weights that stay quantized cannot be sharded",
}


def _setup(
    loader: str, setup: DistributedSetup | None, device_mesh: DeviceMesh | None, kwargs: dict[str, Any]
) -> DistributedSetup | None:
    """Return the setup to load with, or None for a plain transformers load.

    Raises TypeError for distributed options passed to the loader itself and for values of the wrong type, ValueError
    for a setup and a mesh together, RankError on a rank that is not in the mesh.
    """
    elsewhere = [f"{name} -> {_ELSEWHERE[name]}" for name in kwargs if name in _ELSEWHERE]
    if elsewhere:
        raise TypeError(f"{loader} does not take these keywords of other loaders; use {'; '.join(elsewhere)}")
    moved = [f"{name} -> {_MOVED[name]}" for name in kwargs if name in _MOVED]
    if moved:
        raise TypeError(
            f"{loader} takes distributed options in one object, distributed_setup=; move {'; '.join(moved)}"
        )
    if setup is not None and device_mesh is not None:
        raise ValueError("pass either distributed_setup or device_mesh, not both; the setup has a mesh of its own")
    if isinstance(device_mesh, MeshContext):
        raise TypeError(
            "device_mesh must be a torch DeviceMesh (got a MeshContext); pass distributed_setup=, or its .device_mesh"
        )
    if device_mesh is not None:
        setup = DistributedSetup.from_mesh(device_mesh)
    if setup is None:
        return None
    if not isinstance(setup, DistributedSetup):
        raise TypeError(
            f"distributed_setup must be a DistributedSetup (got {setup!r}); make one with DistributedSetup.build()"
        )
    if not setup.mesh_context.holds_this_rank:
        raise RankError(f"this rank has no place in the mesh over ranks {setup.ranks}; load only on those ranks")
    return setup


def _target(setup: DistributedSetup) -> Target:
    return Target(
        shard=setup.shard,
        device=_parameter_device(setup),
        ranks=setup.ranks,
        splits_layers=setup.plan.splitting(Role.LAYERS) > 1,
    )


def _parameter_device(setup: DistributedSetup) -> torch.device:
    """Return the device that keeps the parameters between forwards: that of the mesh, or what the strategy says."""
    return torch.device(declared(setup.strategy, "parameter_device") or setup.mesh_context.device)


def _refuse_placement(kwargs: dict[str, Any]) -> None:
    """Raise TypeError for transformers keywords that place weights themselves, and for ``weights_only=False``."""
    for name in ("device_map", "max_memory", "offload_folder"):
        if kwargs.get(name) is not None:
            raise TypeError(f"{name} and distributed_setup both place the weights; leave {name} out")
    if kwargs.get("weights_only", True) is not True:
        raise TypeError("weights_only=False would run code from the checkpoint; convert it to safetensors")


def _refuse_files(source: Any, kwargs: dict[str, Any]) -> None:
    """Raise CheckpointError for files that transformers does not load as a model, or into shards: of *source*."""
    if not isinstance(source, str | os.PathLike):
        return
    place = Path(source, kwargs.get("subfolder", ""))
    if problem := unloadable(place) or damaged_index(place):
        raise CheckpointError(problem)
    given = _given(kwargs, *_PLACE, *_ACCESS) | (kwargs.get("adapter_kwargs") or {})
    if is_peft_available() and find_adapter_config_file(os.fspath(source), **given):
        raise CheckpointError(
            f"{os.fspath(source)} has adapters of PEFT, which are not loaded into shards; merge them on one process "
            "(PEFT's merge_and_unload, then save_pretrained) and load that folder, or load a folder without "
            "adapter_config.json and train new ones: setup.add_adapters(model, peft_config)"
        )


def _given(kwargs: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: kwargs[name] for name in names if name in kwargs}


def _finish(setup: DistributedSetup, parts: list[nn.Module], origin: dict[str, Any]) -> object:
    for module in (module for part in parts for module in part.modules()):
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(setup.mesh_context.device)
    given = setup.wrap(parts)
    mark_loaded(parts)
    for part in parts:
        remember_loss(inner_model(part))
    model = inner_model(parts[0])
    if isinstance(model, PreTrainedModel):
        refuse_other_loops(model)
        remember_origin(model, **_given(origin, *_PLACE))
        own: Any = model if isinstance(given, nn.Module) else given
        with suppress(AttributeError):  # what a plugin presents may take none
            own.save_pretrained = partial(_save_pretrained, setup.sharded(parts), model, model.save_pretrained)
            own.resize_token_embeddings = partial(_resize_token_embeddings, model)
    return given


def _resize_token_embeddings(
    model: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
) -> Any:
    """Return the input embedding if it has the wanted size; otherwise raise ValueError, as shards cannot be resized."""
    embedding = model.get_input_embeddings()
    tokens = embedding.weight.shape[0]
    wanted = tokens if new_num_tokens is None else new_num_tokens
    wanted += -wanted % (pad_to_multiple_of or 1)
    if wanted != tokens:
        raise ValueError(
            f"a sharded model cannot be resized from {tokens} tokens to {wanted}; load it in one process with "
            "transformers, resize_token_embeddings and save_pretrained there, and load that folder"
        )
    return embedding


def _save_pretrained(
    sharded: ShardedModel,
    model: PreTrainedModel,
    original: Callable[..., None],
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    *,
    max_shard_size: int | str = "50GB",
    **others: Any,
) -> None:
    """Save a sharded model like ``Runtime.export``, or its adapters as transformers does; all ranks must call this."""
    if has_adapters(model):
        original(save_directory, is_main_process=is_main_process, max_shard_size=max_shard_size, **others)
        return
    if others:
        raise TypeError(
            f"save_pretrained of a sharded model takes a folder and max_shard_size (got {', '.join(others)}); "
            "save it, then do the rest with the folder"
        )
    export(sharded, save_directory, max_shard_size=max_shard_size)


class _Loader:
    """The shared code of all loaders; ``auto`` is the transformers class that resolves the model class."""

    auto: ClassVar[Any]

    def __init__(self) -> None:
        name = type(self).__name__
        raise TypeError(f"{name} makes models; call {name}.from_pretrained(...) or {name}.from_config(...)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        distributed_setup: DistributedSetup | None = None,
        device_mesh: DeviceMesh | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the model at a path or hub name, sharded in place; each rank reads only its own slices.

        ``distributed_setup`` or ``device_mesh`` says how; with neither, this is transformers' own loader. ``kwargs``
        are transformers'; ``dtype`` is that of the stored parameters. The result is a transformers model, or an
        ``AutoPipeline`` when pp > 1.

        Raises TypeError for a keyword that moved to ``DistributedSetup.build``, CheckpointError for a checkpoint that
        is missing or damaged, RankError when another rank failed.
        """
        setup = _setup(cls.__name__, distributed_setup, device_mesh, kwargs)
        if setup is None:
            return cls.auto.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        _refuse_placement(kwargs)
        if kwargs.get("output_loading_info"):
            raise TypeError("output_loading_info is not supported with distributed_setup or device_mesh; leave it out")
        with (
            made_on_cpu(),
            read_through(_target(setup), pretrained_model_name_or_path, Draws(setup.ranks)) as reading,
        ):
            _refuse_files(pretrained_model_name_or_path, kwargs)
            model = cls.auto.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        return _finish(setup, reading.parts(model), kwargs)

    @classmethod
    def from_config(
        cls,
        config: PretrainedConfig,
        *,
        distributed_setup: DistributedSetup | None = None,
        device_mesh: DeviceMesh | None = None,
        init: str = WHOLE,
        **kwargs: Any,
    ) -> Any:
        """Return a new model, sharded in place; the first rank's CPU generator determines its weights.

        So ``torch.manual_seed`` before the call fixes them, the same for every topology. A rank holds no more than its
        shards and one tensor being drawn. ``init``: "whole" draws every weight on every rank, bit for bit as
        transformers does on one process; "slices" draws only what this rank holds, other numbers of the same
        distributions, at the cost of the shard. Other keywords and errors as for ``from_pretrained``.

        Raises ValueError where "whole" would take more than ten minutes.
        """
        if init not in INITS:
            raise ValueError(f"init must be one of {', '.join(map(repr, INITS))} (got {init!r})")
        setup = _setup(cls.__name__, distributed_setup, device_mesh, kwargs)
        if setup is None:
            if init != WHOLE:
                raise TypeError(f"init={init!r} needs distributed_setup or device_mesh; leave it out on one process")
            return cls.auto.from_config(config, **kwargs)
        _refuse_placement(kwargs)
        with made_on_cpu():
            return cls._new(config, setup, kwargs, init)

    @classmethod
    def _new(cls, config: PretrainedConfig, setup: DistributedSetup, kwargs: dict[str, Any], init: str) -> Any:
        draws = Draws(setup.ranks)
        told = config_fields(config) | {name: brief(value) for name, value in (kwargs | {"init": init}).items()}
        same, generator = share_and_hear("the model", told, None, setup.ranks, word=draws.offer())
        refuse_differences("the model", same)
        draws.follow(generator)

        def build() -> Any:
            # a copy, as plugins change the config, for example the attention implementation
            return cls.auto.from_config(copy.deepcopy(config), **kwargs)

        with draws.shared(), reported("building the model", setup.ranks):
            if init == WHOLE:
                refuse_long_draws(build)
            with DeferredInit() if init == WHOLE else SliceInit(int(torch.randint(2**63 - 1, ()))) as drawn:
                model = build()
        drawn.hollow(model)
        with reported("sharding the model", setup.ranks):
            parts = setup.shard(model)
            for part in parts:
                drawn.fill(inner_model(part), _parameter_device(setup))
        return _finish(setup, parts, {})


# Names of NeMo AutoModel for classes of transformers that are called otherwise.
_OTHERS = {"NeMoAutoModelBiEncoder": "AutoModel", "NeMoAutoModelCrossEncoder": "AutoModelForSequenceClassification"}


def __getattr__(name: str) -> Any:
    """Make the loader *name*, of the Auto class of transformers that is called so without ``NeMo``."""
    auto = getattr(transformers, _OTHERS.get(name, name.removeprefix("NeMo")), None)
    if not name.startswith("NeMoAutoModel") or auto is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    doc = f"Load a model of transformers' ``{auto.__name__}``; see ``from_pretrained`` and ``from_config``."
    made = type(name, (_Loader,), {"auto": auto, "__doc__": doc, "__module__": __name__})
    globals()[name] = made
    return made
