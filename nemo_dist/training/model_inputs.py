"""Give a training forward no cache, and packed sequences in the form that transformers keeps apart.

Several sequences are packed into one row by positions that restart. transformers recognises them only where the forward
makes no cache and gets no mask; with either, tokens attend to the sequences before theirs, and nothing says so.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from nemo_dist.hf_model import accepts, attention_of, class_name, inner_model
from nemo_dist.plugin.hookspecs import Batch
from nemo_dist.training.rehearsal import mixes_packed_sequences
from nemo_dist.training.router_aux_loss import COUNTED

# What a collator gives to fused kernels beside, or in place of, positions: where packed sequences start and end.
_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


@attrs.frozen(eq=False, slots=False)
class ModelInputs:
    """Prepares the batches of one model; ``part`` is the transformers model, one of its stages, or a wrapper of it."""

    part: nn.Module

    def __call__(self, batch: Batch) -> dict[str, Any]:
        """Return *batch* for a training forward; raise ValueError for packed sequences that the model would mix."""
        inputs = self._packed_apart(positioned(batch, self._fused))
        if self._caches:
            inputs["use_cache"] = False
        return inputs

    @cached_property
    def _caches(self) -> bool:
        return accepts(self.part, "use_cache") and accepts(inner_model(self.part), "use_cache")

    @cached_property
    def _fused(self) -> bool:
        """Whether attention is a kernel that reads the boundaries of packed sequences."""
        return "flash" in str(attention_of(inner_model(self.part)))

    @cached_property
    def _mixes(self) -> str | None:
        return mixes_packed_sequences(inner_model(self.part))

    def _packed_apart(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Take out a mask beside positions that restart; padding becomes sequences of one token.

        Which tokens count for a router loss stays in ``counted_tokens``. Other batches stay as they are.
        """
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        if not _per_token(positions) or not (mask is None or _per_token(mask)) or not restarts(mask, positions).any():
            return inputs
        self._refuse_mixing(len(positions) if mask is None else len(mask))
        if mask is None:
            return inputs
        del inputs["attention_mask"]
        if not mask.all():
            # No position follows the largest one, so no sequence goes on in the padding before it or after it.
            inputs["position_ids"] = positions.expand_as(mask).masked_fill(mask == 0, int(positions.max()))
            inputs[COUNTED] = mask != 0
        return inputs

    def _refuse_mixing(self, rows: int) -> None:
        name = class_name(inner_model(self.part))
        way_out = "give every sequence a row of its own, padded, with an attention_mask"
        if self._mixes is not None:
            raise ValueError(
                f"positions restart, as in packed sequences, but {name} does not keep packed sequences apart (tokens "
                f"see each other in {self._mixes}); {way_out}"
            )
        if self._fused and rows > 1:
            raise ValueError(
                f"positions restart in a batch of {rows} rows, but flash attention keeps packed sequences apart only "
                "in batches of one row; join the rows, or load the model with attn_implementation='sdpa'"
            )


def positioned(batch: Batch, fused: bool) -> dict[str, Any]:
    """Return *batch* with ``position_ids``, if it has the boundaries of packed sequences in their place.

    Boundaries are left out unless attention is *fused*: nothing else reads them, and they are not values per token.
    """
    inputs = dict(batch)
    tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")
    if inputs.get("position_ids") is None and isinstance(tokens, Tensor):
        ends, index = inputs.get("cu_seq_lens_q"), inputs.get("seq_idx")
        if isinstance(ends, Tensor):
            lengths = ends.diff().long()
            index = torch.arange(len(lengths), device=ends.device).repeat_interleave(lengths).view(tokens.shape[:2])
        if isinstance(index, Tensor):
            inputs["position_ids"] = _counted_from_changes(index)
    return inputs if fused else {name: value for name, value in inputs.items() if name not in _BOUNDARIES}


def _counted_from_changes(index: Tensor) -> Tensor:
    """Return positions (rows, length) that start at 0 in each row and wherever *index* changes."""
    places = torch.arange(index.shape[1], device=index.device).expand_as(index)
    changes = index.diff(dim=1, prepend=index[:, :1] - 1) != 0
    return places - torch.where(changes, places, 0).cummax(1).values


def restarts(mask: Tensor | None, positions: Tensor) -> Tensor:
    """Return which tokens start another sequence of their row: bool, of the shape of *mask* or *positions*.

    Their position is not above that of the last token before them that *mask* lets count.
    """
    real = torch.ones_like(positions, dtype=torch.bool) if mask is None else mask != 0
    positions = torch.where(real, positions, -1)
    places = torch.arange(real.shape[1], device=real.device).expand_as(real)
    last = torch.where(real, places, -1).cummax(1).values[:, :-1]
    before = torch.where(last < 0, -1, positions.gather(1, last.clamp(min=0)))
    found = torch.zeros_like(real)
    found[:, 1:] = real[:, 1:] & (positions[:, 1:] <= before)
    return found


def _per_token(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2
