"""Compare what several ranks hold of one tensor before one of them writes it, as it would hide that they differ."""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Collection, Mapping, Sequence

import attrs
import torch
from torch import Tensor

from nemo_dist.checkpoint.chunks import Chunk, Entry, chunks
from nemo_dist.errors import CheckpointError
from nemo_dist.mesh.dtensor import digest
from nemo_dist.mesh.rank_group import RankGroup

Item = tuple[str, Chunk]  # a chunk of the tensor of that name

_NAMED = 5  # tensors that an error names


@attrs.frozen(kw_only=True)
class Copies:
    """What this rank holds of the chunks that several ranks hold.

    ``held``: by the ranks that hold them, the chunks. ``digests``: those of this rank's chunks.
    """

    held: Mapping[tuple[int, ...], Sequence[Item]]
    digests: Mapping[Item, int]

    @classmethod
    def of(
        cls, rank: int, state: Mapping[str, Tensor], entries: Mapping[str, Entry], but: Collection[str] = ()
    ) -> Copies:
        """Digest the chunks of *state* that other ranks have too, by *entries*; those of the names in *but* are not."""
        held: dict[tuple[int, ...], list[Item]] = {}
        for name, entry in entries.items():
            for chunk, holders in entry.holders.items():
                if len(holders) > 1:
                    held.setdefault(tuple(holders), []).append((name, chunk))
        shared = {item for holders, items in held.items() if rank in holders for item in items}
        compared = {name: tensor for name, tensor in state.items() if name not in but}
        return cls(held=held, digests=_digests(compared, shared))

    def compare(self, ranks: RankGroup, made: Sequence[str]) -> None:
        """Raise CheckpointError on every rank when copies differ between ranks; on an accelerator warn.

        There, kernels that add in any order make replicas differ in their last bits. ``made``: the plugins that made
        the optimizer, to be named. Collective over *ranks* where there are copies: one number for every set of ranks
        that hold the same chunks.
        """
        if not self.held:
            return
        everywhere = ranks.gather([self._sum(items) for items in self.held.values()])
        odd = {
            holders: items
            for index, (holders, items) in enumerate(self.held.items())
            if len({everywhere[rank][index] for rank in holders}) > 1
        }
        if not odd:
            return
        text = self._difference(ranks, odd, made)
        if ranks.device.type == "cpu":
            raise CheckpointError(text)
        warnings.warn(text, stacklevel=2)

    def _sum(self, items: Sequence[Item]) -> int:
        return zlib.crc32(json.dumps([self.digests.get(item) for item in items]).encode())

    def _difference(self, ranks: RankGroup, odd: Mapping[tuple[int, ...], Sequence[Item]], made: Sequence[str]) -> str:
        """Return in words which tensors differ on which ranks; collective over *ranks*."""
        listed = [(holders, item) for holders, items in odd.items() for item in items]
        everywhere = ranks.gather([self.digests.get(item) for _, item in listed])
        lines: dict[str, str] = {}
        for index, (holders, (name, _)) in enumerate(listed):
            first = everywhere[holders[0]][index]
            others = [str(rank) for rank in holders if everywhere[rank][index] != first]
            if others:
                lines.setdefault(name, f"- {name}: rank {', '.join(others)} differs from rank {holders[0]}")
        more = [f"- and {len(lines) - _NAMED} more"] if len(lines) > _NAMED else []
        owners = [f"the optimizer is that of plugin {' and '.join(map(repr, made))}"] if made else []
        return "\n".join(
            [
                "several ranks hold the same parts of these, and they differ, so a checkpoint would be a mix of them:",
                *list(lines.values())[:_NAMED],
                *more,
                *owners,
                "a plugin that keeps optimizer state on one rank lists only the parameters of that rank in "
                "param_groups; one whose replicas differ by design declares replicas_differ = True; else the training "
                "has gone wrong before this point, and runtime.check_replicas() finds where",
            ]
        )


def _digests(state: Mapping[str, Tensor], wanted: Collection[Item]) -> dict[Item, int]:
    """Return the digests of the chunks that are *wanted*; read from the device at once."""
    found = [
        ((name, chunk), digest(values))
        for name, tensor in state.items()
        for chunk, values in chunks(tensor)
        if (name, chunk) in wanted
    ]
    by_device: dict[torch.device, list[int]] = {}
    for index, (_, value) in enumerate(found):
        by_device.setdefault(value.device, []).append(index)
    numbers: dict[int, int] = {}
    for indices in by_device.values():
        numbers |= dict(zip(indices, torch.stack([found[index][1] for index in indices]).tolist(), strict=True))
    return {item: numbers[index] for index, (item, _) in enumerate(found)}
