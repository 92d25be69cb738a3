"""Check that ranks of one data-parallel coordinate got the same batch, once, on the first step.

Ranks with different batches may still have to run the same modules. That is checked with numbers that are summed along
with the label counts, in the all-reduce that every step needs anyway.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import attrs
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_dist.errors import RankError
from nemo_dist.hf_model import is_media
from nemo_dist.planning.mesh_plan import Role

if TYPE_CHECKING:
    from nemo_dist.mesh.mesh_context import MeshContext
    from nemo_dist.plugin.hookspecs import Batch


@attrs.define(eq=False)
class BatchCheck:
    """Compares the batches of the first step only: later ones come from the same loader."""

    done: bool = False

    def once(self, batches: Sequence[Batch], mesh: MeshContext) -> None:
        """Raise RankError on every rank when ranks of one data-parallel coordinate got different *batches*.

        On the first call it all-gathers three int64 per rank over the mesh; later calls do nothing.
        """
        if self.done or mesh.device_mesh is None or mesh.device_mesh.size() == mesh.size(Role.BATCH):
            return
        self.done = True
        differing = _differences(_everywhere([dist.get_rank(), mesh.rank(Role.BATCH), digest(batches)], mesh))
        if differing:
            raise RankError(
                "ranks that share a batch were given different ones:\n"
                + "\n".join(f"- {line}" for line in differing)
                + "\nread with DistributedSampler(data, num_replicas=runtime.dp_size, rank=runtime.dp_rank), and seed "
                "what is drawn by runtime.dp_rank"
            )


def form(batches: Sequence[Batch]) -> str:
    """Return as text which modules *batches* run: the tower inputs of each batch, in order."""
    media = [sorted(name for name, value in batch.items() if is_media(name, value)) for batch in batches]
    return ", then ".join(" and ".join(names) or "text only" for names in media)


def tally(count: Tensor, batches: Sequence[Batch]) -> Tensor:
    """Return four integers per rank; their sums give the sum of *count* and whether all ranks have the same ``form``.

    They are the count, 1, and a 16-bit hash of the form and its square, from whose sums the variance follows.
    """
    code = int.from_bytes(hashlib.blake2b(form(batches).encode(), digest_size=2).digest(), "big")
    numbers = torch.tensor([0, 1, code, code * code]).to(count.device, non_blocking=True)
    numbers[0] = count
    return numbers


def require_one_form(sums: Tensor, batches: Sequence[Batch]) -> None:
    """Raise RankError when the summed ``tally`` of all ranks shows that their batches run different modules."""
    _, ranks, total, squares = sums.tolist()
    if ranks * squares != total * total:  # the variance of the hashes is not 0
        raise RankError(
            f"the batches of different data-parallel ranks make them run different modules, so they would wait for "
            f"each other for ever; this rank was given: {form(batches)}. Give every rank equally many batches and, in "
            f"each, the same kinds of input (a blank image where there is none, its labels -100)"
        )


def digest(batches: Sequence[Batch]) -> int:
    """Return a 64-bit hash of the names, dtypes, shapes and values in *batches*.

    Of a value that is neither a tensor nor None, a bool, a number or text, only the type counts.
    """
    state = hashlib.blake2b(digest_size=8)
    for index, batch in enumerate(batches):
        for name, value in sorted(batch.items()):
            if isinstance(value, Tensor):
                state.update(f"{index} {name} {value.dtype} {tuple(value.shape)}".encode())
                state.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            else:
                plain = value is None or isinstance(value, bool | int | float | str)
                state.update(f"{index} {name} {value if plain else type(value).__name__}".encode())
    return int.from_bytes(state.digest(), "big", signed=True)


def _everywhere(mine: list[int], mesh: MeshContext) -> list[list[int]]:
    """Return the numbers of every rank of the mesh, all-gathered along one axis after the other."""
    rows = torch.tensor([mine], dtype=torch.int64, device=mesh.device)
    for axis in (mesh.device_mesh and mesh.device_mesh.mesh_dim_names) or ():
        group = mesh.group(axis)
        if group is not None:
            pieces = [torch.empty_like(rows) for _ in range(mesh.size(axis))]
            dist.all_gather(pieces, rows, group=group)
            rows = torch.cat(pieces)
    found: list[list[int]] = rows.tolist()
    return found


def _differences(rows: list[list[int]]) -> list[str]:
    """Return one line per data-parallel coordinate whose ranks differ: which ranks, and from which."""
    shared: dict[int, dict[int, int]] = {}
    for rank, place, value in sorted(rows):
        shared.setdefault(place, {})[rank] = value
    lines = []
    for place, values in sorted(shared.items()):
        usual = Counter(values.values()).most_common(1)[0][0]
        odd = [rank for rank, value in values.items() if value != usual]
        if odd:
            same = [rank for rank in values if rank not in odd]
            ours, theirs = ", ".join(map(str, odd)), ", ".join(map(str, same))
            lines.append(f"data-parallel rank {place}: the batch of rank {ours} is not that of rank {theirs}")
    return lines
