"""Draw initial weights alike on every rank, also those that a checkpoint lacks."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nemo_dist.deferred import DeferredInit
from nemo_dist.meeting import meet
from nemo_dist.weights import filled, slots


@contextmanager
def shared_draws(ranks: Sequence[int] | None) -> Iterator[None]:
    """Draw from the CPU generator of the first of *ranks* (None: all) on every one; another state is put back after."""
    mine = torch.get_rng_state()
    text = base64.b64encode(mine.numpy().tobytes()).decode()
    follows = dist.is_initialized() and dist.get_rank() != (ranks[0] if ranks else 0)
    shared = meet("the generator for the weights", "" if follows else text, lambda states: states[0], ranks)
    if shared == text:
        yield
        return
    torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(shared)), dtype=torch.uint8))
    try:
        yield
    finally:
        torch.set_rng_state(mine)


@torch.no_grad()
def draw_missing(part: nn.Module, initialise: Callable[[], None], ranks: Sequence[int] | None) -> None:
    """Run *initialise*, which draws the weights that *part* lacks, as one process would on every one of *ranks*."""
    missing: dict[int, tuple[nn.Parameter, Tensor]] = {}
    lacking = [slot for slot in slots(part) if _lacks_values(slot[2])]
    with shared_draws(ranks), DeferredInit() as init:
        for module, name, parameter in lacking:
            if id(parameter) not in missing:
                missing[id(parameter)] = (parameter, torch.empty(parameter.shape, dtype=parameter.dtype))
            setattr(module, name, nn.Parameter(missing[id(parameter)][1], requires_grad=parameter.requires_grad))
        initialise()
    drawn = {
        key: filled(parameter, init.replay(whole), _local_device(parameter))
        for key, (parameter, whole) in missing.items()
    }
    for module, name, parameter in lacking:
        setattr(drawn[id(parameter)], "_is_hf_initialized", True)  # noqa: B010  # transformers' mark: do not draw again
        setattr(module, name, drawn[id(parameter)])


def _local_device(parameter: nn.Parameter) -> torch.device:
    return parameter.to_local().device if isinstance(parameter, DTensor) else parameter.device


def _lacks_values(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, DTensor) and not getattr(parameter, "_is_hf_initialized", False)
