"""The one place that touches transformers' weight loader: shard the meta model before a weight is read.

transformers builds the model on meta, hands it to ``PreTrainedModel._load_pretrained_model`` and later, for weights
that the checkpoint lacks, to ``_initialize_missing_keys``. Both names are private to it; ``tests/test_loading.py``
holds the contract. For every parameter that is a DTensor its loader reads only the local slice, on the CPU as a view of
the mapped file.
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
    """What draws the weights that a checkpoint lacks; see ``missing_weights``."""

    def foresee(self, model: nn.Module, names: Collection[str], initialise: Callable[[], None]) -> None:
        """Draw those of a model that is divided into parts."""

    def draw(self, part: nn.Module, initialise: Callable[[], None]) -> None:
        """Give *part* its own."""


def refuse_uneven(parts: Sequence[nn.Module]) -> None:
    """Raise TopologyError that names every parameter of *parts* that two axes cut on one dim in unlike ways.

    Where the dim does not divide, what FSDP2 leaves a rank of a tensor-parallel shard is not always what transformers
    reads for it.
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
    """Where the weights go: ``shard`` turns the model on meta into this rank's parts, which are filled on ``device``.

    ``ranks`` load together (None: all); ``splits_layers`` says that each of them may get a part of the layers only.
    """

    shard: Callable[[nn.Module], list[nn.Module]]
    device: torch.device
    ranks: Sequence[int] | None
    splits_layers: bool


@attrs.define
class Reading:
    """One ``from_pretrained`` under way: the target that shards the model, and the parts that came of it."""

    target: Target
    source: Any
    missing: Missing
    _parts: list[nn.Module] = attrs.field(factory=list)
    _reported: bool = False

    def load(self, original: Callable[..., Any], model: Any, state: Any, files: Any, config: Any, *rest: Any) -> Any:
        """Shard *model*, then let transformers read the slices of every part; return its answer for *model*."""
        if self.target.device.type != "cpu":
            # frozen, but transformers uses it again to finish
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
            info.unexpected_keys -= whole  # what this part does not have, another one does
        self._agree_on_shapes(infos, config)
        if undivided is not None:
            self._foresee(undivided, infos, config)
        for part in parts:
            if part is not model:
                part._finalize_model_loading(part, config, infos[id(part)])
        return answer

    def _models(self) -> list[nn.Module]:
        """Return the transformers models of the parts, which a plugin may have wrapped."""
        return [inner_model(part) for part in self._parts]

    def _read(self, original: Callable[..., Any], part: Any, *args: Any) -> Any:
        whole = part._initialize_missing_keys
        part._initialize_missing_keys = lambda quantized: self.missing.draw(part, lambda: whole(quantized))
        return original(part, *args)

    def _foresee(self, model: Any, infos: Mapping[int, Any], config: Any) -> None:
        """Have the weights drawn that any part of the divided *model* lacks; *infos* as for the shapes."""
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
        """Tell all ranks of a shape that only some slices betray: of 10 and of 9 rows, most ranks have equal slices.

        ``infos`` are transformers' loading infos by the identity of the part.
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
        """Return the parts of the *model* that ``from_pretrained`` returned."""
        if not self._parts:
            raise CheckpointError(
                f"{class_name(model)} does not load through transformers' weight loader, so it could not be sharded"
            )
        for part in self._models():
            part.__dict__.pop("_initialize_missing_keys", None)
        return self._parts

    def fail(self, error: Exception) -> NoReturn:
        """Raise *error*, as a CheckpointError when it came from the files, after every other rank has been told."""
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
    """Within the context, a model that transformers loads is sharded by *target* before its weights are read."""
    reading = Reading(target, source, missing)
    original = PreTrainedModel._load_pretrained_model

    def load(model: Any, state: Any, files: Any, config: Any, *rest: Any, **more: Any) -> Any:
        return reading.load(lambda *args: original(*args, **more), model, state, files, config, *rest)

    private: Any = PreTrainedModel  # the name is an implementation detail of transformers
    private._load_pretrained_model = staticmethod(load)
    try:
        yield reading
    except Exception as error:
        reading.fail(error)
    finally:
        private._load_pretrained_model = staticmethod(original)
