"""Draw initial weights that are equal on every rank, also those that a checkpoint lacks."""

from __future__ import annotations

import base64
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nemo_dist.errors import CheckpointError
from nemo_dist.hf_model import INITIALIZED, class_name
from nemo_dist.loading.deferred_init import DeferredInit
from nemo_dist.mesh.dtensor import filled, local, parameter_slots


@attrs.define
class Draws:
    """Draw the weights that a checkpoint lacks, as one process would, on each of *ranks* (None: all).

    The ranks draw from the state that the CPU generator of the first of them had at ``offer``, so drawing itself needs
    no communication, and a rank that fails in between leaves no other one waiting.
    """

    ranks: Sequence[int] | None
    _state: Tensor | None = attrs.field(default=None, init=False)
    _whole: Mapping[str, Callable[[], Tensor]] = attrs.field(factory=dict, init=False)

    def offer(self) -> str:
        """Return the state of the generator on the first of the ranks, as text, and an empty text on the others."""
        return "" if self._follows else base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode()

    def follow(self, offered: str) -> None:
        """Draw from the state that the first of the ranks has *offered*."""
        self._state = torch.frombuffer(bytearray(base64.b64decode(offered)), dtype=torch.uint8)

    @property
    def _follows(self) -> bool:
        return dist.is_initialized() and dist.get_rank() != (self.ranks[0] if self.ranks else 0)

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Within the context, draw from the shared state, and go on from there the next time.

        A rank whose own state differed gets it back afterwards; the generators of the others keep what the draws
        advanced.
        """
        mine = torch.get_rng_state()
        start = self._state if self._follows and self._state is not None else mine
        differs = not torch.equal(mine, start)
        if differs:
            torch.set_rng_state(start)
        try:
            yield
        finally:
            self._state = torch.get_rng_state()
            if differs:
                torch.set_rng_state(mine)

    @torch.no_grad()
    def foresee(self, model: nn.Module, names: Collection[str], initialise: Callable[[], None]) -> None:
        """Record the draws of the missing weights *names* in the order of the whole *model*, which is on meta.

        ``draw`` then uses them, because a part alone does not know what other parts draw before it.
        """
        origins: dict[str, Tensor] = {}
        with self.shared(), DeferredInit() as init:
            for path, module, name, parameter in parameter_slots(model):
                if path in names:
                    origins[path] = torch.empty(parameter.shape, dtype=parameter.dtype)
                    setattr(module, name, nn.Parameter(origins[path], requires_grad=parameter.requires_grad))
                else:
                    _mark(parameter)
            initialise()
        _refuse_memory(model, init, origins)
        self._whole = {path: partial(init.replay, origin) for path, origin in origins.items()}

    @torch.no_grad()
    def draw(self, part: nn.Module, initialise: Callable[[], None]) -> None:
        """Fill the weights that *part* lacks; *initialise* draws them and creates the buffers that no file contains.

        What is lacking is recorded and drawn on the CPU, wherever it is, so that every rank and device gets the same.
        *initialise* may compute with weights that are loaded, before it skips them: sharded ones are replaced by whole
        ones on the meta device meanwhile.
        """
        if self._whole:
            for path, module, name, parameter in parameter_slots(part):
                if path in self._whole and not _marked(parameter):
                    setattr(module, name, _mark(filled(parameter, self._whole[path](), local(parameter).device)))
        missing: dict[int, tuple[nn.Parameter, Tensor]] = {}
        slots = list(parameter_slots(part))
        lacking = [slot for slot in slots if not _marked(slot[3])]
        loaded = [slot for slot in slots if _marked(slot[3]) and isinstance(slot[3], DTensor)]
        for _, module, name, parameter in loaded:
            setattr(module, name, _mark(_standing_in_for(parameter)))
        with self.shared(), DeferredInit() as init:
            for _, module, name, parameter in lacking:
                if id(parameter) not in missing:
                    missing[id(parameter)] = (parameter, torch.empty(parameter.shape, dtype=parameter.dtype))
                setattr(module, name, nn.Parameter(missing[id(parameter)][1], requires_grad=parameter.requires_grad))
            initialise()
        _refuse_memory(part, init, {path: missing[id(parameter)][1] for path, _, _, parameter in lacking})
        for _, module, name, parameter in loaded:
            setattr(module, name, parameter)
        drawn = {
            key: _mark(filled(parameter, init.replay(whole), local(parameter).device))
            for key, (parameter, whole) in missing.items()
        }
        for _, module, name, parameter in lacking:
            setattr(module, name, drawn[id(parameter)])


def _refuse_memory(model: nn.Module, init: DeferredInit, missing: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError for weights that no code fills: every rank would have what was in its memory."""
    ties: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    tied = ties.keys() | set(ties.values())  # one of the two may be loaded
    left = sorted(path for path, whole in missing.items() if path not in tied and init.leaves(whole))
    if left:
        raise CheckpointError(
            f"the checkpoint lacks {', '.join(left[:3])}{f' and {len(left) - 3} more' if len(left) > 3 else ''}, and "
            f"_init_weights of {class_name(model)} does not fill them: transformers makes a model without memory when "
            "it loads, so on every rank they would have what was in memory; fill them there, with "
            "transformers.initialization, or save them on one process with save_pretrained, and load that"
        )


def _standing_in_for(parameter: nn.Parameter) -> nn.Parameter:
    whole = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    return nn.Parameter(whole, requires_grad=parameter.requires_grad)


def _mark(parameter: nn.Parameter) -> nn.Parameter:
    """Mark *parameter* as initialised, in the way that makes transformers skip it."""
    setattr(parameter, INITIALIZED, True)
    return parameter


def _marked(parameter: nn.Parameter) -> bool:
    return bool(getattr(parameter, INITIALIZED, False))
