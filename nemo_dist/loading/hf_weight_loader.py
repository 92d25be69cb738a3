"""The only module that hooks into transformers' weight loader: it shards the meta model before weights are read.

transformers builds the model on the meta device, passes it to ``PreTrainedModel._load_pretrained_model`` and later, for
weights that the checkpoint lacks, to ``_initialize_missing_keys``. Both names are private to transformers;
``tests/test_loading.py`` tests what is relied on. For a DTensor parameter, transformers reads only the local slice, on
the CPU as a view of the memory-mapped file.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol

import attrs
import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.modeling_utils import PreTrainedModel

from nemo_dist.errors import CheckpointError, RankError, TopologyError
from nemo_dist.hf_model import class_name, inner_model
from nemo_dist.mesh.dtensor import local_slice
from nemo_dist.mesh.store_consensus import consensus, report


class Missing(Protocol):
    """Draws the weights that a checkpoint lacks; see ``missing_weights``."""

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
    _reported: bool = False

    def load(self, original: Callable[..., Any], model: Any, state: Any, files: Any, config: Any, *rest: Any) -> Any:
        """Shard *model*, then let transformers load the slices of every part; return its result for *model*."""
        if self.target.device.type != "cpu":
            # The config is frozen, but transformers reads device_map from it again to finish the model.
            object.__setattr__(config, "device_map", {"": self.target.device})
        whole = frozenset(model.state_dict())
        undivided = copy.deepcopy(model) if self.target.splits_layers else None
        self._parts = self.target.shard(model)
        parts: list[Any] = self._models()
        infos: dict[int, Any] = {}
        answer = None
        for part in parts:
            info, *rest_of_answer = self._read(original, part, state, files, config, *rest)
            infos[id(part)] = info
            answer = (info, *rest_of_answer) if part is model else answer
        self._report(None)
        for info in infos.values():
            info.unexpected_keys -= whole  # keys that this part lacks belong to another part of the model
        self._agree_on_shapes(infos, config)
        if undivided is not None:
            self._foresee(undivided, infos, config)
        for part in parts:
            if part is not model:
                part._finalize_model_loading(part, config, infos[id(part)])
        return answer

    def _models(self) -> list[nn.Module]:
        """Return the transformers model in each part, as a plugin may have wrapped it."""
        return [inner_model(part) for part in self._parts]

    def _read(self, original: Callable[..., Any], part: Any, *args: Any) -> Any:
        whole = part._initialize_missing_keys
        part._initialize_missing_keys = lambda quantized: self.missing.draw(part, lambda: whole(quantized))
        return original(part, *args)

    def _foresee(self, model: Any, infos: Mapping[int, Any], config: Any) -> None:
        """Draw the weights that the checkpoint lacks for any part of *model*, the whole model on the meta device.

        ``infos`` are transformers' loading infos by the id of the part. The names are merged from all ranks.
        """
        mine: set[str] = set()
        for part in self._models():
            info: Any = infos[id(part)]
            tied: Any = part.all_tied_weights_keys
            mine |= (info.missing_keys - tied.keys()) | {name for name, *_ in info.mismatched_keys}
        names = consensus(
            "the weights that the checkpoint lacks",
            sorted(mine),
            lambda lists: sorted({name for ours in lists for name in ours}),
            self.target.ranks,
        )
        if names:
            self.missing.foresee(model, names, lambda: model._initialize_missing_keys(config.is_quantized))

    def _agree_on_shapes(self, infos: Mapping[int, Any], config: Any) -> None:
        """Merge the shape mismatches of all ranks, as only some may see them; raise CheckpointError unless ignored.

        A 10-row and a 9-row parameter, for example, give most ranks equal slices. ``infos`` are transformers' loading
        infos by the id of the part.
        """
        mismatched = [item for info in infos.values() for item in info.mismatched_keys]
        mine = [[name, list(found), list(wanted)] for name, found, wanted in mismatched]
        union = consensus(
            "the shapes in the checkpoint",
            mine,
            lambda lists: {item[0]: item for ours in lists for item in ours},
            self.target.ranks,
        )
        if union and not config.ignore_mismatched_sizes:
            lines = [f"- {name}: a slice of {a} in the checkpoint, {b} in the model" for name, a, b in union.values()]
            raise CheckpointError(
                f"{config.pretrained_model_name_or_path} does not fit the model; pass ignore_mismatched_sizes=True to "
                "draw these anew:\n" + "\n".join(lines)
            )
        for part in self._models():
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
        if not self._reported:
            self._report(failure)
        raise failure

    def _report(self, failure: Exception | None) -> None:
        self._reported = True
        report("reading the checkpoint", failure, self.target.ranks)


@contextmanager
def read_through(target: Target, source: Any, missing: Missing) -> Iterator[Reading]:
    """Within the context, shard every model that transformers loads with *target* before its weights are read."""
    reading = Reading(target, source, missing)
    original = PreTrainedModel._load_pretrained_model

    def load(model: Any, state: Any, files: Any, config: Any, *rest: Any, **more: Any) -> Any:
        return reading.load(lambda *args: original(*args, **more), model, state, files, config, *rest)

    private: Any = PreTrainedModel  # typed as Any, because the attribute is private to transformers
    private._load_pretrained_model = staticmethod(load)
    try:
        yield reading
    except Exception as error:
        reading.fail(error)
    finally:
        private._load_pretrained_model = staticmethod(original)
