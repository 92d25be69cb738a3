"""The only module that hooks into transformers' weight loader: it shards the meta model before weights are read.

transformers builds the model on the meta device, passes it to ``PreTrainedModel._load_pretrained_model`` and later, for
weights that the checkpoint lacks, to ``_initialize_missing_keys``. Both names are private to transformers;
``tests/test_loading.py`` tests what is relied on. For a DTensor parameter, transformers reads only the local slice, on
the CPU as a view of the memory-mapped file; ``weight_conversion`` says what it converts whole. The function that makes
a DTensor of the slice would move it to the device of the mesh, and is replaced too, for shards that are kept elsewhere.

The ranks meet three times: to compare what they load, when all have read their weights, and when the model is finished.
In between no rank waits for another, so an error on one of them is soon an error on all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NoReturn, Protocol

import attrs
import torch
import transformers.core_model_loading
import transformers.distributed.sharding_utils
import transformers.modeling_utils
from safetensors import SafetensorError
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.modeling_utils import PreTrainedModel

from nemo_dist.errors import CheckpointError, RankError, TopologyError
from nemo_dist.hf_model import class_name, detach_computed, inner_model, plain_class
from nemo_dist.loading.conversion_rules import shape_of
from nemo_dist.loading.names_of_parts import WholeModel
from nemo_dist.loading.own_buffers import with_own_buffers
from nemo_dist.loading.same_source import config_fields, file_fields
from nemo_dist.loading.weight_conversion import convert_and_load
from nemo_dist.mesh.dtensor import from_local, local_slice, parameter_slots
from nemo_dist.mesh.store_consensus import refuse_differences, share_and_hear

_COMPARING, _READING, _FINISHING = "comparing what to load", "reading the checkpoint", "finishing the model"
_NEXT = {_COMPARING: _READING, _READING: _FINISHING, _FINISHING: _FINISHING}


class Missing(Protocol):
    """Draws the weights that a checkpoint lacks; see ``missing_weights``."""

    def offer(self) -> str:
        """Return what the other ranks need to draw the same weights."""

    def follow(self, offered: str) -> None:
        """Draw as the first of the ranks *offered*."""

    def foresee(self, model: nn.Module, names: Collection[str], initialise: Callable[[], None]) -> None:
        """Prepare the missing weights *names* of a whole model that is split into parts, before ``draw``."""

    def draw(self, part: nn.Module, initialise: Callable[[], None]) -> None:
        """Fill the missing weights of *part*."""


def refuse_uneven(parts: Sequence[nn.Module]) -> None:
    """Raise TopologyError for parameters whose shard on this rank differs from the slice that transformers reads.

    This happens where two mesh axes shard one tensor dim that does not divide evenly: FSDP2 and transformers may then
    assign the elements of a tensor-parallel shard differently. The error names every such parameter.
    """
    problems = []
    for part in parts:
        for name, parameter in part.named_parameters():
            if isinstance(parameter, DTensor) and any(hasattr(how, "split_factor") for how in parameter.placements):
                own = parameter.to_local().shape
                read = local_slice(torch.empty(parameter.shape, device="meta"), parameter).shape
                if own != read:
                    problems.append(
                        f"{name} of shape {tuple(parameter.shape)} cannot be cut along one dim by axes of sizes "
                        f"{tuple(parameter.device_mesh.shape)}: this rank would hold {tuple(own)} and read "
                        f"{tuple(read)}; choose sizes whose product divides that dim"
                    )
    if problems:
        raise TopologyError(problems)


def refuse_quantized(parts: Sequence[nn.Module], quantizer: Any) -> None:
    """Raise CheckpointError for sharded parameters that *quantizer* would leave quantized; None stands for none."""
    kept = [
        name
        for part in parts
        for name, parameter in part.named_parameters()
        if quantizer is not None
        and isinstance(parameter, DTensor)
        and _stays_quantized(name, parameter, part, quantizer)
    ]
    if kept:
        config = type(quantizer.quantization_config).__name__
        raise CheckpointError(
            f"{len(kept)} sharded parameters ({kept[0]}, ...) would stay quantized, and quantized weights cannot be "
            f"sharded; pass quantization_config={config}(dequantize=True) where it has that option, or dequantize the "
            "checkpoint on one process and load what save_pretrained writes"
        )


def _stays_quantized(name: str, parameter: DTensor, part: nn.Module, quantizer: Any) -> bool:
    plain = parameter.dtype.is_floating_point and parameter.dtype.itemsize > 1
    return not plain or bool(quantizer.param_needs_quantization(inner_model(part), name))


def refuse_apart(model: Any) -> None:
    """Raise CheckpointError for a parameter that modules of *model* share and transformers would load as several.

    It keeps one of several modules only where the class declares it, and draws the others anew.
    """
    declared = dict(model.all_tied_weights_keys or {})
    names: dict[nn.Parameter, list[str]] = {}
    for name, _, _, parameter in parameter_slots(model):
        if name not in declared:
            names.setdefault(parameter, []).append(name)
    for shared in names.values():
        if len(shared) > 1:
            raise CheckpointError(
                f"{class_name(model)} makes {' and '.join(shared[:3])} one parameter, and transformers loads each by "
                "itself; say so in its _tied_weights_keys, with tie_word_embeddings=True in the config, or let these "
                "modules be one module"
            )


def _thaw(model: nn.Module) -> None:
    """Let all weights of *model* require gradients: what a class has frozen, transformers thaws by loading it.

    It does so for tensors, and not for the DTensors that take their place.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())


def _keep_origin(part: nn.Module) -> None:
    """Let sharded classes in *part* say that they come from where the plain class does.

    torch makes a subclass of a class that it shards. transformers tells by the module of its class whether a model is
    custom code, of which it skips the initialisation where no weight of its own is missing, with all buffers that the
    model fills in its submodules.
    """
    for module in part.modules():
        if isinstance(module, PreTrainedModel) and plain_class(module) is not type(module):
            type(module).__module__ = plain_class(module).__module__


@attrs.frozen(kw_only=True)
class Target:
    """How to load: ``shard`` turns the meta model into this rank's parts, whose weights are put on ``device``.

    ``ranks`` load together (None: all). ``splits_layers``: whether a rank may hold only some of the layers.
    """

    shard: Callable[[nn.Module], list[nn.Module]]
    device: torch.device
    ranks: Sequence[int] | None
    splits_layers: bool


@attrs.define
class Reading:
    """One ``from_pretrained`` call in progress: its target, its source, and the parts that sharding returned."""

    target: Target
    source: Any
    missing: Missing
    _parts: list[nn.Module] = attrs.field(factory=list)
    _whole: WholeModel | None = None  # of a model that is split into parts
    _occasion: str | None = _COMPARING  # where the ranks meet next; None once they have met in vain

    def load(self, original: Callable[..., Any], model: Any, state: Any, files: Any, config: Any) -> Any:
        """Shard *model*, then let transformers load the slices of every part; return its result for *model*."""
        if self._parts:
            raise CheckpointError(
                f"transformers would load more than one model of {str(self.source)!r}, as it does for adapters, and "
                "shards take one; load it from a folder without adapters"
            )
        self._occasion = _COMPARING
        told = {"class": class_name(model)} | config_fields(model.config) | file_fields(files)
        refuse_differences("the model", self._meet(told))
        if self.target.device.type != "cpu":
            # The config is frozen, but transformers reads device_map from it again to finish the model.
            object.__setattr__(config, "device_map", {"": self.target.device})
        whole = frozenset(model.state_dict())
        detach_computed(model)
        refuse_apart(model)
        _thaw(model)
        undivided: Any = copy.deepcopy(model) if self.target.splits_layers else None
        self._whole = None if undivided is None else WholeModel.of(undivided)
        self._parts = self.target.shard(model)
        refuse_quantized(self._parts, config.hf_quantizer)
        parts: list[Any] = self._models()
        infos: dict[int, Any] = {}
        answer = None
        for part in parts:
            _keep_origin(part)
            info, *rest_of_answer = self._read(original, part, state, files, config)
            infos[id(part)] = info
            answer = (info, *rest_of_answer) if part is model else answer
        found, generator = self._meet_and_hear(
            {
                "lacking": sorted(self._lacking(infos)),
                "mismatched": [[n, list(a), list(b)] for info in infos.values() for n, a, b in info.mismatched_keys],
            },
            self.missing.offer(),
        )
        self.missing.follow(generator)
        for info in infos.values():
            info.unexpected_keys -= whole  # keys that this part lacks belong to another part of the model
        self._agree_on_shapes(infos, config, {item[0]: item for ours in found for item in ours["mismatched"]})
        lacking = sorted({name for ours in found for name in ours["lacking"]})
        if undivided is not None and lacking:
            self.missing.foresee(undivided, lacking, lambda: undivided._initialize_missing_keys(config.is_quantized))
        for part in parts:
            if part is not model:
                part._finalize_model_loading(part, config, infos[id(part)])
        return answer

    def _models(self) -> list[nn.Module]:
        """Return the transformers model in each part, as a plugin may have wrapped it."""
        return [inner_model(part) for part in self._parts]

    def state_for(self, part: Any, state: Any, mapping: Any) -> Any:
        """Return what of the checkpoint *state* the *part* takes by the transforms *mapping*."""
        return state if self._whole is None else self._whole.state_for(part, state, mapping or [])

    def _read(self, original: Callable[..., Any], part: Any, *args: Any) -> Any:
        whole = part._initialize_missing_keys
        part._initialize_missing_keys = lambda quantized: with_own_buffers(
            part, lambda: self.missing.draw(part, lambda: whole(quantized))
        )
        return original(part, *args)

    def _lacking(self, infos: Mapping[int, Any]) -> set[str]:
        """Return the weights that the checkpoint lacks for any part, or has in another shape.

        ``infos`` are transformers' loading infos by the id of the part. Raises CheckpointError for weights that could
        not be converted.
        """
        failed = {name: text for info in infos.values() for name, text in info.conversion_errors.items()}
        if failed:
            lines = [f"- {name}: {'; '.join(text.splitlines()[-2:])}" for name, text in sorted(failed.items())]
            raise CheckpointError(f"weights of {str(self.source)!r} cannot be converted:\n" + "\n".join(lines))
        lacking: set[str] = set()
        for part in self._models():
            info: Any = infos[id(part)]
            tied: Any = part.all_tied_weights_keys
            lacking |= (info.missing_keys - tied.keys()) | {name for name, *_ in info.mismatched_keys}
        return lacking

    def _agree_on_shapes(self, infos: Mapping[int, Any], config: Any, union: Mapping[str, Any]) -> None:
        """Note the shape mismatches of all ranks, *union*; raise CheckpointError unless they are ignored.

        Only some ranks may see them: a 10-row and a 9-row parameter, for example, give most ranks equal slices.
        ``infos`` are transformers' loading infos by the id of the part.
        """
        if union and not config.ignore_mismatched_sizes:
            lines = [f"- {name}: a slice of {a} in the checkpoint, {b} in the model" for name, a, b in union.values()]
            raise CheckpointError(
                f"{config.pretrained_model_name_or_path} does not fit the model; pass ignore_mismatched_sizes=True to "
                "draw these anew:\n" + "\n".join(lines)
            )
        for part in self._models() if union else ():
            info = infos[id(part)]
            own = set(part.state_dict()) - {name for name, _, _ in info.mismatched_keys}
            info.mismatched_keys |= {(name, tuple(f), tuple(w)) for name, f, w in union.values() if name in own}

    def parts(self, model: nn.Module) -> list[nn.Module]:
        """Return the parts of *model*, which ``from_pretrained`` returned; raise CheckpointError if not sharded."""
        if not self._parts:
            raise CheckpointError(
                f"{class_name(model)} does not load through transformers' weight loader, so it could not be sharded"
            )
        for part in self._models():
            part.__dict__.pop("_initialize_missing_keys", None)
        return self._parts

    def fail(self, error: Exception) -> NoReturn:
        """Raise *error*, as a CheckpointError when reading the files failed, after reporting it to the other ranks."""
        if isinstance(error, SafetensorError | OSError) and not isinstance(error, RankError):
            failure: Exception = CheckpointError(f"cannot read the checkpoint {str(self.source)!r}: {error}")
            failure.__cause__ = error
        else:
            failure = error
        if self._occasion is None:  # the other ranks know
            raise failure
        self._meet(None, failure)
        raise failure

    def finish(self) -> None:
        """Meet the other ranks after the model is finished; raise RankError when one of them has failed."""
        self._meet(None)

    def _meet(self, value: Any, failure: Exception | None = None) -> list[Any]:
        """Return the *value* of every rank; raise on all when one has a *failure*."""
        return self._meet_and_hear(value, None, failure)[0]

    def _meet_and_hear(self, value: Any, word: Any, failure: Exception | None = None) -> tuple[list[Any], Any]:
        """Return the *value* of every rank and the *word* of the first; raise on all when one has a *failure*."""
        occasion, self._occasion = self._occasion or _FINISHING, None
        answer = share_and_hear(occasion, value, failure, self.target.ranks, word=word)
        self._occasion = _NEXT[occasion]
        return answer


@contextmanager
def read_through(target: Target, source: Any, missing: Missing) -> Iterator[Reading]:
    """Within the context, shard every model that transformers loads with *target* before its weights are read."""
    reading = Reading(target, source, missing)
    original = PreTrainedModel._load_pretrained_model

    # Under transformers' names, as its own call passes these by place, and the one for adapters by name.
    def load(model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, **more: Any) -> Any:
        return reading.load(lambda *args: original(*args, **more), model, state_dict, checkpoint_files, load_config)

    # typed as Any, because what is replaced is private to transformers
    private: Any = PreTrainedModel
    reader: Any = transformers.modeling_utils
    converter: Any = transformers.core_model_loading
    slicer: Any = transformers.distributed.sharding_utils
    converting, sharding = reader.convert_and_load_state_dict_in_model, reader._dtensor_from_local_like
    slicing = slicer.DtensorShardOperation
    placing, cutting, taking = (
        slicer.compute_local_shape_and_global_offset,
        slicing._slice_and_cat,
        slicing.shard_tensor,
    )

    def convert(model: Any, state_dict: Any, load_config: Any, *others: Any, **more: Any) -> Any:
        state = reading.state_for(model, state_dict, load_config.weight_mapping)
        return convert_and_load(lambda *args: converting(*args, **more), model, state, load_config, *others)

    def shard(part: Any, like: Any) -> DTensor:
        return from_local(part.contiguous().to(target.device), like.device_mesh, like.placements, like=like)

    def cut(operation: Any, source: Any, intervals: Any, *others: Any) -> Any:
        """Cut as transformers does, also for a rank without a part, where more ranks share a dim than it is long."""
        return cutting(operation, source, [several or [(0, 0)] for several in intervals], *others)

    def take(operation: Any, source: Any, tensor_idx: Any = None, device: Any = None, dtype: Any = None) -> Any:
        """Take the slice as transformers does, and the whole of a source without the dim that is cut."""
        ndim, of_one = len(shape_of(source)), operation.param_ndim - 1
        dims = [placement.dim % (of_one + 1) for placement in operation.placements if hasattr(placement, "dim")]
        if (tensor_idx is None or ndim != of_one) and any(dim >= ndim for dim in dims):
            return source[...].to(device=device, dtype=dtype)
        return taking(operation, source, tensor_idx, device, dtype)

    private._load_pretrained_model = staticmethod(load)
    slicing._slice_and_cat, slicing.shard_tensor = cut, take
    reader.convert_and_load_state_dict_in_model = convert
    reader._dtensor_from_local_like = converter._dtensor_from_local_like = shard
    # transformers asks for every parameter anew, which takes torch 30 ms each on thousands of ranks
    slicer.compute_local_shape_and_global_offset = lru_cache(maxsize=None)(placing)
    try:
        yield reading
    except Exception as error:
        reading.fail(error)
    else:
        reading.finish()
    finally:
        slicing._slice_and_cat, slicing.shard_tensor = cutting, taking
        slicer.compute_local_shape_and_global_offset = placing
        reader.convert_and_load_state_dict_in_model = converting
        reader._dtensor_from_local_like = converter._dtensor_from_local_like = sharding
        private._load_pretrained_model = staticmethod(original)
