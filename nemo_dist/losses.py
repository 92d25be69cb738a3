"""Losses to give to ``setup.runtime(model, loss=...)``, and what a loss of your own may say of itself.

A loss is a function ``loss(outputs, batch)`` that returns losses and their weights, tensors of one shape, or a sum and
a count. It sees whole rows and whole logits. Where the model predicts the next token, ``batch["shift_labels"]`` are the
labels that stand beside the outputs which predict them. A loss may have these attributes, as those here do:

- ``per_token = True``: the loss of a token depends on the outputs for that token alone, and labels are read from
  ``shift_labels``. Where ranks share sequences, each then computes its own tokens, and no output is joined.
- ``count(batch)``: the sum of the weights, from the batch alone. Without it a pipeline, and a list of batches, cost one
  more forward each, because all weights must be known before the first backward.
- ``rows_together``: how many neighbouring rows belong together, 1 if it has none; None if all rows of a batch do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, log_softmax, logsigmoid, normalize, pad

from nemo_dist.hf_model import IGNORED
from nemo_dist.planning.mesh_plan import Role

if TYPE_CHECKING:
    from nemo_dist.mesh.mesh_context import MeshContext

Batch = Mapping[str, Any]


def labels_of(batch: Batch) -> Tensor:
    """Return the labels of *batch* that stand beside the outputs: shifted, where the model predicts the next token.

    Raises ValueError for a batch without labels.
    """
    found: Tensor | None = batch.get("shift_labels", batch.get("labels"))
    if found is None:
        raise ValueError(f"the batch has no labels (it has {sorted(batch)}); add 'labels', -100 where none counts")
    return found


@attrs.frozen(kw_only=True, eq=False)
class CrossEntropy:
    """Cross entropy of every label that is not -100, of any model with logits and labels.

    ``class_weights``: the weight of each class, by which losses and their mean are weighted, as torch's
    ``CrossEntropyLoss(weight=...)`` does; None weighs all alike. ``z_loss``: the factor of the squared logarithm of the
    softmax's denominator, which is added to each loss and keeps logits from drifting (PaLM, arXiv:2204.02311).
    ``label_smoothing``: as of torch's, the share of the target that is spread over all classes, of which then none may
    have the weight 0.
    """

    per_token = True

    class_weights: Tensor | None = None
    z_loss: float = 0.0
    label_smoothing: float = 0.0

    def __attrs_post_init__(self) -> None:
        if self.label_smoothing and self.class_weights is not None and bool((self.class_weights == 0).any()):
            raise ValueError(
                "label_smoothing spreads a label over all classes, so class_weights of 0 have no mean with it; give "
                "these classes a small weight, or set label_smoothing to 0"
            )

    def count(self, batch: Batch) -> Tensor:
        """Return the sum of the weights of the labels."""
        return self._weights(labels_of(batch)).sum()

    def __call__(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss of every label, and its weight."""
        labels = labels_of(batch).reshape(-1)
        logits = outputs.logits.float().reshape(len(labels), -1)
        weights = self._weights(labels)
        each = None if self.class_weights is None else self.class_weights.to(logits)
        losses = cross_entropy(
            logits, labels, each, reduction="none", ignore_index=IGNORED, label_smoothing=self.label_smoothing
        )
        if each is not None:  # torch's losses are times the weight of their label, by which they are weighted here
            losses = losses / torch.where(weights == 0, 1, weights)
        if self.z_loss:
            losses = losses + self.z_loss * logits.logsumexp(-1).square()
        return losses, weights

    def _weights(self, labels: Tensor) -> Tensor:
        counts = labels != IGNORED
        if self.class_weights is None:
            return counts.float()
        return torch.where(counts, self.class_weights.to(labels.device)[labels.clamp(min=0)], 0).float()


@attrs.frozen(kw_only=True, eq=False)
class Distillation:
    """Kullback-Leibler divergence of a teacher's next-token distribution from the model's, for every counted label.

    The batch has ``teacher_logits`` (rows, length, vocabulary), from ``teacher.forward(batch).logits`` say; or, with
    ``teacher_tokens`` of the same shape, the logits of some tokens only, between which the teacher then divides all its
    probability: see :func:`top_k`. ``temperature`` divides the logits of both, and the loss is multiplied by its square
    (Hinton et al., arXiv:1503.02531). ``labels``: the share of the cross entropy of the labels in the loss.
    """

    per_token = True

    temperature: float = 1.0
    labels: float = 0.0

    def count(self, batch: Batch) -> Tensor:
        """Return the number of labels that count."""
        return (labels_of(batch) != IGNORED).sum()

    def __call__(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss of every label, and whether it counts."""
        labels = labels_of(batch)
        student = log_softmax(outputs.logits.float() / self.temperature, -1)
        if batch.get("teacher_tokens") is not None:
            student = student.gather(-1, batch["teacher_tokens"])
        teacher = log_softmax(batch["teacher_logits"].float() / self.temperature, -1)
        losses = self.temperature**2 * (teacher.exp() * (teacher - student)).sum(-1)
        if self.labels:
            own = cross_entropy(outputs.logits.float().movedim(-1, 1), labels, reduction="none", ignore_index=IGNORED)
            losses = (1 - self.labels) * losses + self.labels * own
        return losses, (labels != IGNORED).float()


def top_k(logits: Tensor, k: int) -> dict[str, Tensor]:
    """Return what :class:`Distillation` reads of a teacher's *logits*, of the *k* likeliest tokens at each place."""
    values, tokens = logits.topk(k, dim=-1)
    return {"teacher_logits": values, "teacher_tokens": tokens}


@attrs.frozen(kw_only=True, eq=False)
class DPO:
    """Direct preference optimisation (Rafailov et al., arXiv:2305.18290), of rows that alternate: chosen, rejected.

    The batch has ``reference_scores`` (rows,), which :func:`row_scores` makes of the outputs of the reference model.
    ``beta``: how strongly the model is held to the reference.
    """

    rows_together = 2

    beta: float = 0.1

    def count(self, batch: Batch) -> Tensor:
        """Return the number of pairs that have labels."""
        return _labelled_pairs(batch).sum()

    def __call__(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss of every pair, and its weight: 1, or 0 where no label of its rows counts."""
        gained = row_scores(outputs, batch) - batch["reference_scores"].float()
        losses = -logsigmoid(self.beta * (gained[0::2] - gained[1::2]))
        return losses, _labelled_pairs(batch).to(losses)


def _labelled_pairs(batch: Batch) -> Tensor:
    counts = (_next_labels(batch) != IGNORED).any(-1)
    return (counts[0::2] | counts[1::2]).float()


def row_scores(outputs: Any, batch: Batch) -> Tensor:
    """Return, for each row, the logarithm of the probability that a next-token model gives to its labels: (rows,).

    Labels of -100 are left out.
    """
    labels = _next_labels(batch).to(outputs.logits.device)
    chosen = log_softmax(outputs.logits.float(), -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return torch.where(labels != IGNORED, chosen, 0).sum(-1)


def _next_labels(batch: Batch) -> Tensor:
    """Return the labels of *batch*, each in the place before its own."""
    labels: Tensor | None = batch.get("shift_labels")
    return pad(labels_of(batch), (0, 1), value=IGNORED)[..., 1:] if labels is None else labels


@attrs.frozen(kw_only=True, eq=False)
class Contrastive:
    """Contrastive loss of embeddings (InfoNCE), of rows that alternate: a query, and the passage that answers it.

    Every query is compared with the passages of all data-parallel ranks, in the batch that they run at the same time; a
    list of batches compares within each. ``mesh``: ``setup.mesh_context``. ``pooling`` makes an embedding of the last
    hidden states of a row: their "mean" where ``attention_mask`` is 1, the "first" or the "last" of these.
    ``temperature`` divides the cosine similarities.
    """

    rows_together = None

    mesh: MeshContext
    temperature: float = 0.05
    pooling: str = attrs.field(default="mean", validator=attrs.validators.in_(("mean", "first", "last")))

    def count(self, batch: Batch) -> Tensor:
        """Return the number of queries."""
        return torch.tensor(len(_mask(batch)) / 2)

    def __call__(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss of every query of this rank, and a weight of 1."""
        found = normalize(self._pooled(outputs.last_hidden_state.float(), _mask(batch)), dim=-1)
        queries, answers = found[0::2], found[1::2]
        passages, first = gathered_rows(answers, self.mesh.group(Role.BATCH))
        places = first + torch.arange(len(answers), device=found.device)
        losses = cross_entropy(queries @ passages.T / self.temperature, places, reduction="none")
        return losses, torch.ones_like(losses)

    def _pooled(self, hidden: Tensor, mask: Tensor) -> Tensor:
        mask = mask.to(hidden.device)
        if self.pooling == "mean":
            shares = mask / mask.sum(1, keepdim=True).clamp(min=1)
            return (hidden * shares[..., None]).sum(1)
        places = torch.arange(mask.shape[1], device=mask.device)
        at = (places * mask).argmax(1) if self.pooling == "last" else mask.argmax(1)
        return hidden[torch.arange(len(hidden), device=mask.device), at]


def _mask(batch: Batch) -> Tensor:
    """Return the attention mask of *batch*, ones if it has none."""
    mask: Tensor | None = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"]) if mask is None else mask


def gathered_rows(rows: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, int]:
    """Return the *rows* of all ranks of *group*, in rank order, and the place of this rank's first; all take part.

    Ranks may have different numbers of rows. The backward sums the gradients that all ranks have for a row. A loss that
    calls this has ``rows_together = None``.
    """
    if group is None:
        return rows, 0
    sizes = [torch.empty((), dtype=torch.int64, device=rows.device) for _ in range(group.size())]
    dist.all_gather(sizes, torch.tensor(len(rows), device=rows.device), group=group)
    counts = [int(size) for size in sizes]
    padded = pad(rows, (0, 0, 0, max(counts) - len(rows)))
    function: Any = _GatherRows
    pieces = function.apply(padded, group)
    found = torch.cat([piece[:count] for piece, count in zip(pieces, counts, strict=True)])
    return found, sum(counts[: dist.get_rank(group)])


class _GatherRows(torch.autograd.Function):
    """Stack equally shaped tensors of all ranks; the backward sums their gradients for this rank's."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        pieces = [torch.empty_like(rows) for _ in range(group.size())]
        dist.all_gather(pieces, rows.contiguous(), group=group)
        return torch.stack(pieces)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)  # each rank's loss depends on the rows of all
        return grad[dist.get_rank(ctx.group)], None
