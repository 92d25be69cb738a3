"""Compute the loss of a model on rows that it is not trained on, the same under every topology."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nemo_dist.training.runtime import Runtime


def held_out_loss(runtime: Runtime, batches: Sequence[Mapping[str, Any]]) -> float:
    """Return the mean loss over the labels of all *batches* of all ranks, without dropout; call it on every rank.

    The one place of the recipe that evaluates: a backward is the part of a step that every composition has, so it runs,
    and its gradients are dropped. Call it between steps, when there are none.
    """
    modes = [part.training for part in runtime.parts]
    for part in runtime.parts:
        part.eval()
    loss = runtime.forward_backward(list(batches)).item()
    for part, mode in zip(runtime.parts, modes, strict=True):
        part.train(mode)
    for _, parameter in runtime.named_parameters():
        parameter.grad = None
    return loss
