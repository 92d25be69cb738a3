"""Compute the next-token cross entropy of logits that are sharded along the vocabulary, without gathering them.

As in Megatron-LM (Shoeybi et al. 2019, section 3), the ranks exchange three numbers per token, not a row of the
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad
from transformers.loss.loss_utils import ForCausalLMLoss

from nemo_dist.hf_model import IGNORED
from nemo_dist.torch_private import assert_on_device
from nemo_dist_tensor.collectives import Peers

LossFunction = Callable[..., Tensor]


def can_stay_cut(loss: LossFunction) -> bool:
    """Whether *loss*, a model's own loss function, is the one that ``VocabularyParallelLoss`` computes."""
    return loss is ForCausalLMLoss


@attrs.frozen(eq=False)
class VocabularyParallelLoss:
    """transformers' ``ForCausalLMLoss`` for logits sharded along the vocabulary (a DTensor); *whole* takes others."""

    peers: Peers
    whole: LossFunction

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Any = None,
        ignore_index: int = IGNORED,
        shift_labels: Tensor | None = None,
        **more: Any,
    ) -> Tensor:
        """Return the mean of the token losses (0-dim float32), or their sum over *num_items_in_batch* if that is given.

        ``logits``: (..., tokens, vocabulary). ``labels``: (..., tokens), shifted here; ``shift_labels`` are not.
        """
        if not isinstance(logits, DTensor):
            return self.whole(
                logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels=shift_labels, **more
            )
        if shift_labels is None:
            shift_labels = pad(labels, (0, 1), value=ignore_index)[..., 1:]
        start, length = self.peers.bounds(logits.shape[-1])
        scores = logits.to_local().float().reshape(-1, length)
        targets = shift_labels.reshape(-1).to(scores.device)
        _refuse_foreign(targets, logits.shape[-1], ignore_index)
        losses = _token_losses(scores, targets - start, targets != ignore_index, self.peers)
        count = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
        return losses.sum() / (count.to(scores.device) if isinstance(count, Tensor) else count)


def _refuse_foreign(targets: Tensor, vocabulary: int, ignored: int) -> None:
    """Raise, as on one process, for a label outside of the vocabulary, which is in no rank's piece."""
    wrong = (targets != ignored) & ((targets < 0) | (targets >= vocabulary))
    if targets.device.type != "cpu":
        # Reading the answer here would make the host wait.
        assert_on_device(~wrong.any(), f"a label is no token of a vocabulary of {vocabulary}")
    elif bool(wrong.any()):
        raise IndexError(f"label {int(targets[wrong][0])} is no token of a vocabulary of {vocabulary}")


def _token_losses(scores: Tensor, targets: Tensor, counts: Tensor, peers: Peers) -> Tensor:
    function: Any = _TokenLosses
    losses: Tensor = function.apply(scores, targets, counts, peers)
    return losses


class _TokenLosses(Function):
    """The loss of every token, 0 where it does not count; ``targets`` are relative to this rank's piece."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, targets: Tensor, counts: Tensor, peers: Peers) -> Tensor:
        local_size = scores.shape[1]  # 0 where the vocabulary has fewer tokens than there are ranks
        highest = scores.max(dim=1).values if local_size else scores.new_full((len(scores),), -torch.inf)
        highest = peers.all_reduce(highest, "max")
        shifted = scores - highest.unsqueeze(1)
        is_here = counts & (targets >= 0) & (targets < local_size)
        columns = targets.clamp(0, max(local_size - 1, 0)).unsqueeze(1)
        nothing = torch.zeros_like(highest)
        chosen = torch.where(is_here, shifted.gather(1, columns).squeeze(1), nothing) if local_size else nothing
        exponentials = shifted.exp_()
        total, chosen = peers.all_reduce(torch.stack([exponentials.sum(dim=1), chosen])).unbind()
        ctx.save_for_backward(exponentials, total, counts, is_here, columns)
        return torch.where(counts, total.log() - chosen, nothing)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        exponentials, total, counts, is_here, columns = ctx.saved_tensors
        share = torch.where(counts, grad, torch.zeros_like(grad))
        result = exponentials * (share / total).unsqueeze(1)
        if result.shape[1]:
            result.scatter_add_(1, columns, -torch.where(is_here, share, torch.zeros_like(share)).unsqueeze(1))
        return result, None, None, None
