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

from nemo_dist.hf_model import INITIALIZED
from nemo_dist.loading.deferred_init import DeferredInit
from nemo_dist.mesh.dtensor import filled, local, parameter_slots
from nemo_dist.mesh.store_consensus import consensus


@contextmanager
def shared_draws(ranks: Sequence[int] | None) -> Iterator[None]:
    """Within the context, every one of *ranks* (None: all) draws from the CPU generator state of the first of them.

    A rank whose state differed gets it back afterwards; the first rank's generator keeps what the draws advanced.
    """
    mine = torch.get_rng_state()
    text = base64.b64encode(mine.numpy().tobytes()).decode()
    follows = dist.is_initialized() and dist.get_rank() != (ranks[0] if ranks else 0)
    shared = consensus("the generator for the weights", "" if follows else text, lambda states: states[0], ranks)
    if shared == text:
        yield
        return
    torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(shared)), dtype=torch.uint8))
    try:
        yield
    finally:
        torch.set_rng_state(mine)


@attrs.define
class Draws:
    """Draw the weights that a checkpoint lacks, as one process would, on each of *ranks* (None: all)."""

    ranks: Sequence[int] | None
    _whole: Mapping[str, Callable[[], Tensor]] = attrs.field(factory=dict, init=False)

    @torch.no_grad()
    def foresee(self, model: nn.Module, names: Collection[str], initialise: Callable[[], None]) -> None:
        """Record the draws of the missing weights *names* in the order of the whole *model*, which is on meta.

        ``draw`` then uses them, because a part alone does not know what other parts draw before it. Collective over the
        ranks.
        """
        origins: dict[str, Tensor] = {}
        with shared_draws(self.ranks), DeferredInit() as init:
            for path, module, name, parameter in parameter_slots(model):
                if path in names:
                    origins[path] = torch.empty(parameter.shape, dtype=parameter.dtype)
                    setattr(module, name, nn.Parameter(origins[path], requires_grad=parameter.requires_grad))
                else:
                    _mark(parameter)
            initialise()
        self._whole = {path: partial(init.replay, origin) for path, origin in origins.items()}

    @torch.no_grad()
    def draw(self, part: nn.Module, initialise: Callable[[], None]) -> None:
        """Fill the weights that *part* lacks; *initialise* draws them and creates the buffers that no file contains."""
        if self._whole:
            for path, module, name, parameter in parameter_slots(part):
                if path in self._whole and not _marked(parameter):
                    setattr(module, name, _mark(filled(parameter, self._whole[path](), local(parameter).device)))
        missing: dict[int, tuple[nn.Parameter, Tensor]] = {}
        lacking = [slot for slot in parameter_slots(part) if isinstance(slot[3], DTensor) and not _marked(slot[3])]
        with shared_draws(self.ranks), DeferredInit() as init:
            for _, module, name, parameter in lacking:
                if id(parameter) not in missing:
                    missing[id(parameter)] = (parameter, torch.empty(parameter.shape, dtype=parameter.dtype))
                setattr(module, name, nn.Parameter(missing[id(parameter)][1], requires_grad=parameter.requires_grad))
            initialise()
        drawn = {
            key: _mark(filled(parameter, init.replay(whole), local(parameter).device))
            for key, (parameter, whole) in missing.items()
        }
        for _, module, name, parameter in lacking:
            setattr(module, name, drawn[id(parameter)])


def _mark(parameter: nn.Parameter) -> nn.Parameter:
    """Mark *parameter* as initialised, in the way that makes transformers skip it."""
    setattr(parameter, INITIALIZED, True)
    return parameter


def _marked(parameter: nn.Parameter) -> bool:
    return bool(getattr(parameter, INITIALIZED, False))
