"""Refuse the training loops of others, which would wrap a sharded model again and weigh its loss in their own way."""

from __future__ import annotations

from typing import Any, NoReturn

import attrs


@attrs.frozen
class _Refusal:
    """A flag that only the loop called ``loop`` asks for; asking raises."""

    loop: str

    def __bool__(self) -> NoReturn:
        raise TypeError(
            f"{self.loop} cannot train a model that was loaded with a distributed_setup or device_mesh: it would wrap "
            "the shards again, and average losses without their numbers of labels. Train it with setup.runtime(model), "
            "or with `nemo-dist train`; for this loop, load the model without them"
        )


def refuse_other_loops(model: Any) -> None:
    """Let transformers' Trainer and accelerate's Accelerator raise TypeError as they start, where they get *model*."""
    model._is_distributed_loading_by_transformers = _Refusal("transformers' Trainer")
    model._is_accelerate_prepared = _Refusal("accelerate's Accelerator")
