"""Compare what several ranks hold of one tensor before one of them writes it, as it would hide that they differ.

Each rank digests its copies and adds them up with weights that sum to zero over the ranks with the same part of a
tensor. One number is summed over all ranks; only when that is not zero do they tell each other which copies differ.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Collection, Mapping, Sequence

import attrs
import torch
from torch import Tensor

from nemo_dist.checkpoint.chunks import chunks
from nemo_dist.checkpoint.save_plan import Copy, SavePlan
from nemo_dist.errors import CheckpointError
from nemo_dist.mesh.dtensor import digest
from nemo_dist.mesh.rank_group import RankGroup
from nemo_dist.mesh.store_consensus import is_imagined

_NAMED = 5  # tensors that an error names
_PRIME = (1 << 47) - 115  # so that the sum over 65,536 ranks fits an int64


@attrs.frozen(kw_only=True)
class Copies:
    """The ``digests`` of what this rank and others hold; ``compared``: some rank of all has such copies."""

    compared: bool
    digests: Mapping[Copy, int]

    @classmethod
    def of(cls, plan: SavePlan, state: Mapping[str, Tensor], but: Collection[str] = ()) -> Copies:
        """Digest the copies of *plan* in *state*, but those of the names in *but*; nothing in a dry run."""
        if is_imagined():
            return cls(compared=False, digests={})
        copies = [copy for copy in plan.copies if copy.name not in but]
        return cls(compared=plan.replicated, digests=_digests(copies, state))

    def compare(self, ranks: RankGroup, made: Sequence[str]) -> None:
        """Raise CheckpointError on every rank when copies differ between ranks; on an accelerator warn.

        There, kernels that add in any order make replicas differ in their last bits. ``made``: the plugins that made
        the optimizer, to be named. Collective over *ranks* where there are copies.
        """
        if not self.compared:
            return
        (total,) = ranks.total([sum(_weighed(copy, value) for copy, value in self.digests.items()) % _PRIME])
        if total % _PRIME == 0:
            return
        text = self._difference(ranks, made)
        if ranks.device.type == "cpu":
            raise CheckpointError(text)
        warnings.warn(text, stacklevel=2)

    def _difference(self, ranks: RankGroup, made: Sequence[str]) -> str:
        """Return in words which tensors differ on which ranks; collective over *ranks*."""
        own = {copy.label: [copy.name, value] for copy, value in self.digests.items()}
        first: dict[str, tuple[int, int]] = {}
        odd: dict[str, tuple[list[str], int]] = {}
        for rank, held in enumerate(ranks.collect("comparing what several ranks hold", lambda: own)):
            for label, (name, value) in held.items():
                of, expected = first.setdefault(label, (rank, value))
                if value != expected:
                    odd.setdefault(name, ([], of))[0].append(str(rank))
        lines = [f"- {name}: rank {', '.join(others)} differs from rank {of}" for name, (others, of) in odd.items()]
        more = [f"- and {len(lines) - _NAMED} more"] if len(lines) > _NAMED else []
        owners = [f"the optimizer is that of plugin {' and '.join(map(repr, made))}"] if made else []
        return "\n".join(
            [
                "several ranks hold the same parts of these, and they differ, so a checkpoint would be a mix of them:",
                *lines[:_NAMED],
                *more,
                *owners,
                "a plugin that keeps optimizer state on one rank lists only the parameters of that rank in "
                "param_groups; one whose replicas differ by design declares replicas_differ = True; else the training "
                "has gone wrong before this point, and runtime.check_replicas() finds where",
            ]
        )


def _weighed(copy: Copy, value: int) -> int:
    """Return *value* times a number of the label, and times a weight; these weights sum to 0 over the copy's ranks."""
    factor = int.from_bytes(hashlib.blake2b(copy.label.encode(), digest_size=5).digest()) + 1
    return value * factor * (copy.count - 1 if copy.replica == 0 else -1)


def _digests(copies: Sequence[Copy], state: Mapping[str, Tensor]) -> dict[Copy, int]:
    """Return the digest of each of *copies*; read from a device at once."""
    found = [digest(_values(copy, state[copy.name])) for copy in copies]
    by_device: dict[torch.device, list[int]] = {}
    for index, value in enumerate(found):
        by_device.setdefault(value.device, []).append(index)
    numbers: dict[int, int] = {}
    for indices in by_device.values():
        numbers |= dict(zip(indices, torch.stack([found[index] for index in indices]).tolist(), strict=True))
    return {copy: numbers[index] for index, copy in enumerate(copies)}


def _values(copy: Copy, tensor: Tensor) -> Tensor:
    return tensor if copy.chunk is None else dict(chunks(tensor))[copy.chunk]
