"""The loss that ``PipelineConfig.loss_fn`` asks for, in the form of a loss of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor

from nemo_dist.plugin.hookspecs import Batch
from nemo_dist.training.loss_weighting import count_labels


@attrs.frozen(eq=False)
class MeanOfLabels:
    """A loss by a *function* of logits and labels, which returns the mean over the labels that are not -100."""

    function: Callable[[Any, Any], Any]
    model: Any

    def count(self, batch: Batch) -> Tensor:
        """Return the number of labels that count."""
        return count_labels(self.model, {"labels": batch["labels"]})

    def __call__(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the sum of the losses of all labels, and their number; a mean of none is 0/0 and counts as 0."""
        mean = self.function(outputs.logits, batch["labels"])
        count = self.count(batch).to(mean.device)
        return torch.where(count > 0, mean, torch.zeros_like(mean)) * count, count
