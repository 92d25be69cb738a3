"""How fast a run is: tokens a second, the share of what the device can do, and the memory that it takes."""

from __future__ import annotations

import resource
import sys
from typing import Any

import attrs
import torch

from nemo_dist.hf_model import input_embedding
from nemo_dist.planning.device_flops import bfloat16_flops
from nemo_dist.recipe.config import ModelSection
from nemo_dist.recipe.model import weightless

_FORWARD_AND_BACKWARD = 6  # operations per weight and token: two forward, four backward
_ATTENTION = 12  # per layer, token, token that it sees, and unit of width: scores and sums, forward and backward


def operations_per_token(model: Any, length: int) -> float:
    """Return the operations of a training step per token of a row of *length* tokens; *model* may be on meta.

    Counted as in PaLM (Chowdhery et al. 2022, appendix B), with half of the attention, as it is causal. Embeddings that
    are looked up do not count; of the experts of a layer, those that one token goes to.
    """
    config = model.config.get_text_config()
    embedding = getattr(input_embedding(model), "weight", None)
    tied = embedding is getattr(model.get_output_embeddings(), "weight", None)
    weights = 0.0
    for name, parameter in model.named_parameters():
        share = _share_of_experts(config) if ".experts." in name else 1.0
        weights += 0 if parameter is embedding and not tied else parameter.numel() * share
    attention: float = _ATTENTION * config.num_hidden_layers * config.hidden_size * length / 2
    return _FORWARD_AND_BACKWARD * weights + attention


def _share_of_experts(config: Any) -> float:
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((getattr(config, name) for name in names if getattr(config, name, None)), 1)
    return (getattr(config, "num_experts_per_tok", None) or experts) / experts


@attrs.frozen(kw_only=True)
class Throughput:
    """What a rank knows of the speed of the run: the operations per token, and those a second of all its devices."""

    operations: float | None = None
    peak: float | None = None

    @classmethod
    def of(cls, model: ModelSection, length: int, ranks: int) -> Throughput:
        """Return that of the *model* of a recipe; without a share where the device is not known."""
        peak = bfloat16_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        if peak is None:
            return cls()
        return cls(operations=operations_per_token(weightless(model), length), peak=peak * ranks)

    def measured(self, tokens: int, seconds: float) -> dict[str, float]:
        """Return what *tokens* in *seconds* are: ``tokens_per_second``, ``mfu`` from 0 to 1 where known, memory."""
        rate = tokens / max(seconds, 1e-9)
        found = {"tokens_per_second": rate}
        if self.operations is not None and self.peak is not None:
            found["mfu"] = rate * self.operations / self.peak
        return found | {"memory_gb": memory()}


def memory() -> float:
    """Return the most memory that this rank held, in GB: of its GPU, or of the process where it has none."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
