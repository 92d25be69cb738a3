"""Let a transformers model compute parts of sequences: attention over whole ones, with a share of the heads."""

from itertools import count

import attrs
import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from nemo_dist.plugin.forwards import wrap_forward
from nemo_dist_ulysses.batch import SPLIT

_names = count()


def split_sequences(model, group):
    """Make *model* compute batches that ``part_of`` made; others it computes as before."""
    attention = Attention(group)
    name = f"ulysses_{next(_names)}"
    AttentionInterface.register(name, attention.attend)
    AttentionMaskInterface.register(name, attention.mask)
    model.set_attn_implementation(name)
    wrap_forward(model, attention.forward)


@attrs.frozen(eq=False)
class Whole:
    """The mask of whole sequences, in place of that of a part; None is plainly causal."""

    mask: object


@attrs.define(eq=False)
class Attention:
    """Attention of one model, which the ranks of *group* compute together; ``split`` while a batch of parts runs."""

    group: object
    split: bool = False

    def forward(self, forward, *args, **batch):
        """Run the *forward* of the model."""
        self.split = batch.pop(SPLIT, False)
        try:
            return forward(*args, **batch)
        finally:
            self.split = False

    def mask(self, **given):
        """Return the mask for the sequences that attention will see."""
        if not self.split:
            return sdpa_mask(**given)
        size = dist.get_world_size(self.group)
        whole = {name: given[name] * size for name in ("q_length", "kv_length")}
        return Whole(sdpa_mask(**{**given, **whole, "attention_mask": None}))

    def attend(self, module, query, key, value, attention_mask, **options):
        """Return the attention of this rank's tokens: (rows, tokens, heads, width); all ranks of the group take part.

        The mask says whether the batch is one of parts, also where a layer is computed again in the backward.
        """
        if not isinstance(attention_mask, Whole):
            return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        query, key, value = (heads_of_whole(tensor, self.group) for tensor in (query, key, value))
        found, _ = sdpa_attention_forward(module, query, key, value, attention_mask.mask, **options)
        return part_of_heads(found, self.group), None


def heads_of_whole(part, group):
    """Exchange (rows, heads, part, width) for (rows, heads / size, size * part, width)."""
    slices = torch.stack(part.chunk(dist.get_world_size(group), dim=1))
    return torch.cat(Exchange.apply(slices, group).unbind(0), dim=2)


def part_of_heads(whole, group):
    """Exchange (rows, size * part, heads / size, width) for (rows, part, heads, width)."""
    slices = torch.stack(whole.chunk(dist.get_world_size(group), dim=1))
    return torch.cat(Exchange.apply(slices, group).unbind(0), dim=2)


class Exchange(torch.autograd.Function):
    """Send the i-th slice to rank i of a group, and stack what the ranks sent here; the backward sends it back."""

    @staticmethod
    def forward(ctx, slices, group):
        ctx.group = group
        return exchanged(slices, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return exchanged(gradient, ctx.group), None


def exchanged(slices, group):
    """Run the all-to-all; all ranks of *group* take part."""
    found = torch.empty_like(slices, memory_format=torch.contiguous_format)
    dist.all_to_all_single(found, slices.contiguous(), group=group)
    return found
