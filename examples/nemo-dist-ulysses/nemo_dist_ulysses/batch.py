"""Keep this rank's part of every sequence."""

import torch
from torch.nn.functional import pad

SPLIT = "split_over_cp"  # marks a batch of parts; the forward of the model takes it out again
_FILL = {"input_ids": 0, "labels": -100, "shift_labels": -100, "position_ids": 0}


def part_of(batch, size, rank):
    """Return the part of *rank*: (rows, length) tensors -> (rows, length / size), with what a part alone cannot tell.

    That is the label after its last token, so labels are shifted before the cut, and the place of its first token. The
    end is padded until the length divides; causal tokens do not see it, and its labels do not count.
    """
    length = batch["input_ids"].shape[1]
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    mask = tensors.pop("attention_mask", None)
    if mask is not None and not mask.all():
        raise ValueError("ulysses splits rows without padding; give it full rows, or use the plugin 'context'")
    if strange := sorted(tensors.keys() - _FILL.keys() | tensors.keys() & {"position_ids"}):
        raise ValueError(f"ulysses cannot split {', '.join(strange)} along the sequence; use the plugin 'context'")
    if "labels" in tensors:
        tensors.setdefault("shift_labels", pad(tensors["labels"], (0, 1), value=-100)[:, 1:])
        tensors["labels"] = tensors["shift_labels"]  # the loss reads only the shifted ones
    own = -(-length // size)
    # They go on in the padding: positions that began again would mean a second, packed sequence.
    tensors["position_ids"] = torch.arange(own * size, device=batch["input_ids"].device)[None]
    mine = slice(own * rank, own * (rank + 1))
    parts = {
        # Contiguous, as losses view them as one row.
        name: pad(value, (0, own * size - value.shape[1]), value=_FILL[name])[:, mine].contiguous()
        for name, value in tensors.items()
    }
    others = {name: value for name, value in batch.items() if not isinstance(value, torch.Tensor)}
    return {**others, **parts, SPLIT: True}
