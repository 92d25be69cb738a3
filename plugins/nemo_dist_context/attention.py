"""Compute attention over a sequence that is split over ranks, as a mask and an attention function for transformers.

Both are registered under one new name per loaded model. Without a split batch (generation, evaluation on whole
sequences) they call what the model was loaded with: transformers' ``sdpa``, or the ``eager`` attention of its own
module, which knows attention sinks and soft caps. The mask that a layer is given decides which one runs, so that a
layer which is recomputed later does the same again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from weakref import finalize, ref

import attrs
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nemo_dist.hf_model import plain_class
from nemo_dist.torch_private import current_dispatch_mode, disable_current_modes
from nemo_dist_context.batch import APPENDED
from nemo_dist_context.collectives import gather_sequence, to_heads, to_sequence
from nemo_dist_context.packed import Packed, attend, fits, has_kernel, sequence_starts, stretch
from nemo_dist_context.ring import Ring
from nemo_dist_context.ring import fits as ring_fits
from nemo_dist_context.sequence_layout import index_of

if TYPE_CHECKING:
    from nemo_dist_context.sequence_layout import SequenceLayout

_names = count()
_free: dict[str, list[str]] = {}  # names of attentions that are gone, by what these were based on


@attrs.frozen(kw_only=True, eq=False)
class Visible:
    """What the queries of a split batch may attend to; passed through the model in place of a mask.

    ``allowed``: (rows, 1, queries, keys) of bool, or what eager attention adds to its scores. None allows all keys or,
    if ``causal``, those up to the query, of the same sequence if they are ``packed``.
    """

    allowed: Tensor | None
    causal: bool
    packed: Packed | None = None


@attrs.define(kw_only=True, eq=False)
class SharedAttention:
    """Attention of one loaded model, computed together by the ranks of *group*.

    ``base``: the attention that the model was loaded with, "sdpa" or "eager". ``sequences`` are the
    sequence ids of the split batch in the forward, None without one; ``shifted`` says that the loss was given labels
    that were shifted before the split.
    """

    layout: SequenceLayout
    group: Any
    method: str
    base: str = "sdpa"
    sequences: Tensor | None = None
    shifted: bool = False

    def register(self) -> str:
        """Register with transformers; return the name to set as the attention implementation.

        transformers keeps what is registered for ever, so that holds this weakly, and when this is gone its name is
        given to another attention with the same ``base``. A config that is left with the name then means that base.
        """
        free = _free.setdefault(self.base, [])
        name = free.pop() if free else f"nemo_dist_context_{next(_names)}"
        AttentionInterface.register(name, partial(_attend, ref(self), self.base))
        AttentionMaskInterface.register(name, partial(_mask, ref(self), self.base))
        finalize(self, free.append, name).atexit = False
        return name

    def mask(self, *, mask_function: Callable[..., Any], device: Any, use_vmap: bool = False, **rest: Any) -> Any:
        """Return a ``Visible`` for a split batch, else transformers' mask for the attention of whole sequences."""
        ids = self.sequences
        if ids is None:
            return _whole_mask(self.base)(mask_function=mask_function, device=device, use_vmap=use_vmap, **rest)
        causal = mask_function is causal_mask_function
        # A causal query never attends to padding at the end.
        whole = (ids == 1) | (ids == APPENDED) if causal else ids == 1
        known = causal or mask_function is bidirectional_mask_function
        if self.base == "sdpa" and known:
            if whole.all():
                return Visible(allowed=None, causal=causal)
            packed = self._packed(ids) if causal and has_kernel(ids.device, rest["dtype"]) else None
            if packed is not None:
                return Visible(allowed=None, causal=True, packed=packed)
        allowed = self._allowed(ids, mask_function, use_vmap)
        if self.base == "eager":
            allowed = _additive(allowed, ids, rest["dtype"])
        return Visible(allowed=allowed, causal=causal)

    def _packed(self, ids: Tensor) -> Packed | None:
        """Return where the packed sequences of a split batch lie; None where tokens are masked."""
        starts, length = sequence_starts(ids), ids.shape[1]
        if starts is None:
            return None
        spans = ((0, length),) if self.method == "ulysses" else self.layout.spans(length)
        return Packed(ids=ids, stretches=tuple(stretch(starts, *span, ids.device) for span in spans))

    def _allowed(self, ids: Tensor, mask_function: Callable[..., Any], use_vmap: bool) -> Tensor:
        rows, length = ids.shape
        keys = torch.arange(length, device=ids.device)
        queries = keys
        if self.method != "ulysses":
            queries = index_of(self.layout, "indices", length, ids.device)
        if use_vmap:
            whole: Any = sdpa_mask(
                rows, length, length, mask_function=mask_function, allow_is_causal_skip=False, use_vmap=True,
                device=ids.device,
            )  # fmt: skip
            pattern = whole.index_select(2, queries)
        else:
            row = torch.arange(rows, device=ids.device)[:, None, None, None]
            head = torch.zeros((1, 1, 1, 1), dtype=torch.long, device=ids.device)
            places = _places(ids)  # of a packed sequence, its own, as in transformers
            pattern = mask_function(row, head, places[:, None, queries, None], places[:, None, None, :])
        of_query, of_key = ids[:, None, queries, None], ids[:, None, None, :]
        # A masked token attends to what transformers allows it, the whole row; no token attends to it.
        allowed: Tensor = pattern & (of_key > 0) & ((of_query <= 0) | (of_query == of_key))
        return allowed

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        """Return the attention of this rank's queries, (rows, queries, heads, width), over the whole sequence."""
        if not isinstance(attention_mask, Visible):
            return self._local(module, query, key, value, attention_mask, **options), None
        if options.get("position_bias") is not None:
            raise ValueError("context parallelism cannot split a learned position bias; use cp_size=1 for this model")
        options.pop("is_causal", None)
        packed = attention_mask.packed
        if packed is not None and not fits(query, value, options):
            allowed = self._allowed(packed.ids, causal_mask_function, use_vmap=False)
            attention_mask = Visible(allowed=allowed, causal=True)
        if self._goes_round(query, value, attention_mask, options):
            scale = options.get("scaling") or query.shape[-1] ** -0.5
            ring = Ring(layout=self.layout, group=self.group, causal=attention_mask.causal, scale=scale)
            return ring.attend(query, key, value), None
        exchange = self._exchanged if self.method == "ulysses" else self._gathered
        return exchange(module, query, key, value, attention_mask, options), None

    def _goes_round(self, query: Tensor, value: Tensor, mask: Visible, options: Any) -> bool:
        """Whether keys and values go round the ranks; a mask of single tokens needs all of them at once."""
        masked = mask.allowed is not None or mask.packed is not None
        return self.method == "ring" and not masked and ring_fits(query, value, options.get("dropout", 0.0))

    def _gathered(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Visible, options: Any) -> Tensor:
        """Gather all keys and values from the cp ranks; attend with this rank's queries, one causal chunk at a time."""
        length = key.shape[2] * self.layout.size
        pair = gather_sequence(torch.cat((key, value), dim=-1), self.group)
        order = index_of(self.layout, "restoring", length, key.device)
        key, value = pair.index_select(2, order).split((key.shape[-1], value.shape[-1]), dim=-1)
        if self.base == "eager":
            return self._local(module, query, key, value, mask.allowed, **options)
        if mask.allowed is not None or not mask.causal:
            return _sdpa(_like(module), query, key, value, mask.allowed, is_causal=False, **options)
        parts, first = [], 0
        for index, (start, stop) in enumerate(self.layout.spans(length)):
            own = query[:, :, first : first + stop - start]
            first += stop - start
            if mask.packed is not None:
                parts.append(attend(mask.packed.stretches[index], own, key, value, options.get("scaling")))
            else:
                bias = _lower_right(stop - start, stop, key.device)
                parts.append(_masked(own, key[:, :, :stop], value[:, :, :stop], bias, **options))
        return torch.cat(parts, dim=1)

    def _local(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Tensor:
        """Return the attention of these queries over these keys, as the model was loaded, on this rank alone."""
        return _alone(self.base, module, query, key, value, mask, **options)

    def _exchanged(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Visible, options: Any) -> Tensor:
        """Exchange sequence parts for head parts between the cp ranks, attend to whole sequences, and exchange back."""
        length = query.shape[2] * self.layout.size
        key, value = _shared_heads(key, self.layout.size), _shared_heads(value, self.layout.size)
        order = index_of(self.layout, "restoring", length, query.device)
        query, key, value = (to_heads(x, self.group).index_select(2, order) for x in (query, key, value))
        groups = query.shape[1] // key.shape[1]
        if mask.packed is not None:
            found = attend(mask.packed.stretches[0], query, key, value, options.get("scaling"))
        else:
            causal = mask.causal and mask.allowed is None
            found = _sdpa(_like(module, groups), query, key, value, mask.allowed, is_causal=causal, **options)
        back = index_of(self.layout, "gathered", length, query.device)
        return to_sequence(found.transpose(1, 2).index_select(2, back), self.group).transpose(1, 2)


def _places(ids: Tensor) -> Tensor:
    """Return the place of each token in its packed sequence, or in its row where that is not packed: like *ids*."""
    rows = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    starts = torch.where((ids > 1) & (ids.diff(dim=1, prepend=ids[:, :1]) != 0), rows, 0).cummax(1).values
    return torch.where(ids > 0, rows - starts, rows)


def _lower_right(queries: int, keys: int, device: torch.device) -> Tensor:
    """Return the causal mask of the last *queries* of *keys* positions, (1, 1, queries, keys) of bool.

    On CUDA it is torch's own bias, which holds no numbers, and which its fused kernels know; the CPU has no kernel for
    it. It is a tensor subclass, which cannot be made under a dispatch mode, as that of selective recomputation is.
    """
    if device.type == "cuda":
        if current_dispatch_mode() is None:
            return causal_lower_right(queries, keys)
        with disable_current_modes():
            return causal_lower_right(queries, keys)
    positions = torch.arange(keys, device=device)
    return (positions[None, :] <= positions[keys - queries :, None])[None, None]


def _attend(own: ref[SharedAttention], base: str, module: Any, *args: Any, **options: Any) -> tuple[Tensor, None]:
    """Return the attention that *own* computes; where that is gone, the one that it was based on."""
    attention = own()
    return (
        (_alone(base, module, *args, **options), None)
        if attention is None
        else attention.attend(module, *args, **options)
    )


def _mask(own: ref[SharedAttention], base: str, **options: Any) -> Any:
    """Return the mask that *own* makes; where that is gone, the one of what it was based on."""
    attention = own()
    return (_whole_mask(base) if attention is None else attention.mask)(**options)


def _whole_mask(base: str) -> Callable[..., Any]:
    made: Callable[..., Any] = ALL_MASK_ATTENTION_FUNCTIONS[base]
    return made


def _alone(base: str, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Tensor:
    """Return the attention of these queries over these keys, as transformers computes it for *base*."""
    if base == "sdpa":
        return _sdpa(module, query, key, value, mask, **options)
    eager = vars(sys.modules[plain_class(module).__module__])["eager_attention_forward"]
    found: Tensor = eager(module, query, key, value, mask, **options)[0]
    return found


def _additive(allowed: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what eager attention adds to its scores: 0 where *allowed*, else the least number of *dtype*.

    A masked token that may attend to nothing then attends to all of its row alike; but not to what was appended.
    """
    added = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)
    return added.masked_fill((ids == APPENDED)[:, None, None, :], -torch.inf)


def _sdpa(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Tensor:
    """Return transformers' scaled dot-product attention, (rows, queries, heads, width)."""
    found: Tensor = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **options)[0]
    return found


def _masked(query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Tensor:
    """Return ``_sdpa`` with a *mask*, without repeating keys and values that several heads share."""
    dropout, scale, shared = options.get("dropout", 0.0), options.get("scaling"), query.shape[1] != key.shape[1]
    found = scaled_dot_product_attention(query, key, value, mask, dropout, scale=scale, enable_gqa=shared)
    return found.transpose(1, 2).contiguous()


def _like(module: Any, groups: int | None = None) -> Any:
    """Return a stand-in for *module* with what transformers' ``sdpa`` reads: *groups* query heads per key head."""
    own = getattr(module, "num_key_value_groups", 1)
    return SimpleNamespace(num_key_value_groups=own if groups is None else groups, training=module.training)


def _shared_heads(heads: Tensor, size: int) -> Tensor:
    """Repeat the key heads where they are fewer than ranks, so that every rank gets the one its query heads use."""
    return heads if heads.shape[1] % size == 0 else heads.repeat_interleave(size // heads.shape[1], dim=1)
