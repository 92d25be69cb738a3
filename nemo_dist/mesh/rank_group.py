"""The ranks of one mesh as a group: how they exchange metadata, bytes and errors while they save and load."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_dist.errors import CheckpointError
from nemo_dist.mesh.live_groups import live
from nemo_dist.mesh.process_group import has_cpu_backend, timeout_of_group
from nemo_dist.mesh.rank_status import default_store, explained
from nemo_dist.mesh.store_consensus import decide_and_hear, is_imagined, share

if TYPE_CHECKING:
    from nemo_dist.mesh.mesh_context import MeshContext


@attrs.frozen
class RankGroup:
    """The ranks of a mesh, ascending in ``ranks`` (None: all in the process group), and this rank's ``device``.

    For use in a background thread, which may outlive the process group: ``store`` is a separate connection to the
    store (None is that of the process group), ``home`` is the store that it leads to, which ends when no process holds
    it, and ``here`` is the rank of this process in the process group.
    """

    ranks: tuple[int, ...] | None = None
    device: torch.device = attrs.field(factory=lambda: torch.device("cpu"))
    store: dist.Store | None = None
    home: dist.Store | None = attrs.field(default=None, eq=False, repr=False)
    here: int | None = None

    @classmethod
    def of(cls, mesh: MeshContext) -> RankGroup:
        """Return the group of the ranks of *mesh*."""
        laid = None if mesh.device_mesh is None else tuple(sorted(mesh.device_mesh.mesh.flatten().tolist()))
        return cls(laid, mesh.device)

    def in_background(self) -> RankGroup:
        """Return this group for use in another thread: it runs no collective and does not need the process group."""
        fixed = attrs.evolve(self, ranks=self.ranks or tuple(range(_world())), here=_here())
        if self.size == 1:
            return fixed
        home = default_store()
        return attrs.evolve(fixed, store=home.clone(), home=home)  # type: ignore[attr-defined]

    @property
    def size(self) -> int:
        """The number of ranks."""
        return _world() if self.ranks is None else len(self.ranks)

    @property
    def rank(self) -> int:
        """The index of this rank in the group."""
        mine = _here() if self.here is None else self.here
        return mine if self.ranks is None else self.ranks.index(mine)

    @property
    def first(self) -> bool:
        """Whether this is the first rank of the group, which does what only one rank may do."""
        return self.rank == 0

    @contextmanager
    def agreed(self, occasion: str) -> Iterator[None]:
        """Run the with-block on every rank; when it raises on one rank, raise on all once every rank has left it.

        A rank that fails raises its own error (CheckpointError for an OSError), the others a RankError that quotes it.
        Ranks meet through the store, so no rank hangs in a collective when another has failed.
        """
        failure: BaseException | None = None
        try:
            yield
        except Exception as error:
            failure = _in_words(occasion, error)
        share(occasion, None, failure, self.ranks, self.store, self.here)

    def collect(self, occasion: str, value_of: Callable[[], Any]) -> list[Any]:
        """Call *value_of* on every rank and return all results in rank order, gathered through the store.

        Results are small JSON values. When the call raises on one rank, all raise as in ``agreed``. Where every rank
        returns None the result is an empty list.
        """
        value, failure = _tried(occasion, value_of)
        return share(occasion, value, failure, self.ranks, self.store, self.here)

    def decide(self, occasion: str, value_of: Callable[[], Any], decision: Callable[[list[Any]], Any]) -> Any:
        """As ``collect``, but return on every rank what *decision* makes of the values of all, in rank order: JSON.

        *decision* runs on every rank where all values are equal, else on the first only; it raises only RankError.
        """
        value, failure = _tried(occasion, value_of)
        return decide_and_hear(occasion, value, failure, decision, self.ranks, self.store, self.here)[0]

    def distinct(self, occasion: str, text_of: Callable[[], str]) -> list[tuple[list[range], str]]:
        """Call *text_of* on every rank; return each different text once, with the ranks that have it, ascending.

        Texts come in the order of the first ranks that have them. Ranks compare digests. Only when these differ are
        texts sent: each once, by the first rank that has it. Errors as in ``agreed``; collective.
        """
        text = ""

        def digest() -> list[Any]:
            nonlocal text
            text = text_of()
            return digest_of(text)

        classes = self.decide(occasion, digest, alike)
        if len(classes) == 1:
            return [(_ranges(classes[0][0]), text)]
        return [(_ranges(ranks), self._broadcast(text, ranks[0][0], nbytes)) for ranks, nbytes in classes]

    def _broadcast(self, text: str, source: int, nbytes: int) -> str:
        """Return the *text* of the rank *source* of this group, *nbytes* long in UTF-8; all ranks take part."""
        if not nbytes:
            return ""
        buffer = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        if self.rank == source:
            buffer.copy_(torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8))
        with explained():
            dist.broadcast(buffer, source if self.ranks is None else self.ranks[source], group=_group(self.ranks))
        return bytes(buffer.cpu().numpy()).decode()

    def total(self, values: Sequence[int]) -> list[int]:
        """All-reduce a few integers: return the sum over all ranks of each of *values*.

        They are summed on the CPU where the process group has a backend for it, so that no device waits.
        """
        if self.size == 1:
            return [int(value) for value in values]
        if is_imagined():
            return [int(value) * self.size for value in values]
        group = _group(self.ranks)
        sums = torch.tensor(list(values), dtype=torch.int64, device=self._host(group))
        with explained():
            dist.all_reduce(sums, group=group)
        found: list[int] = sums.tolist()
        return found

    def _host(self, group: dist.ProcessGroup | None) -> torch.device:
        """Return the CPU where *group* can communicate from it, so that no device waits or fills, else the device."""
        return torch.device("cpu") if has_cpu_backend(group) else self.device

    def reduce(self, value: Tensor, how: dist.ReduceOp.RedOpType) -> None:
        """All-reduce *value*, on this rank's device, in place over all ranks."""
        if self.size > 1:
            dist.all_reduce(value, op=how, group=_group(self.ranks))

    def exchange(self, outgoing: Sequence[Sequence[Tensor]], sizes: Sequence[int]) -> Tensor:
        """Run one all-to-all of bytes; return what all ranks sent to this one, concatenated in rank order, on the CPU.

        ``outgoing[r]`` are the 1-D uint8 tensors for rank r; ``sizes[r]`` is the number of bytes that rank r sends
        here. The bytes are sent from the CPU where the process group has a backend for it: a device that trains has no
        room for whole tensors.
        """
        group = None if self.size == 1 else _group(self.ranks)
        where = torch.device("cpu") if self.size == 1 else self._host(group)
        parts = [part.to(where) for parts in outgoing for part in parts]
        sent = torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8, device=where)
        if self.size == 1:
            return sent
        received = torch.empty(sum(sizes), dtype=torch.uint8, device=where)
        lengths = [sum(len(part) for part in parts) for parts in outgoing]
        with explained():
            dist.all_to_all_single(received, sent, list(sizes), lengths, group=group)
        return received.cpu()


def digest_of(text: str) -> list[Any]:
    """Return a digest of *text* and its length in bytes, as JSON."""
    content = text.encode()
    return [hashlib.blake2b(content, digest_size=16).hexdigest(), len(content)]


def alike(digests: Sequence[Sequence[Any]]) -> list[Any]:
    """Return, of the digests of all ranks, for each different one which ranks have it, as JSON ranges, and its length.

    In the order of the first ranks that have them.
    """
    if list(digests).count(digests[0]) == len(digests):
        return [[[[0, len(digests), 1]], digests[0][1]]]
    found: dict[str, list[int]] = {}
    for rank, (digest, _) in enumerate(digests):
        found.setdefault(digest, []).append(rank)
    return [[_stretches(ranks), digests[ranks[0]][1]] for ranks in found.values()]


def _stretches(ranks: Sequence[int]) -> list[list[int]]:
    """Return the ascending *ranks* as few ranges of equal steps: (start, stop, step) each."""
    found, index = [], 0
    while index < len(ranks):
        step = ranks[index + 1] - ranks[index] if index + 1 < len(ranks) else 1
        last = index
        while last + 1 < len(ranks) and ranks[last + 1] - ranks[last] == step:
            last += 1
        found.append([ranks[index], ranks[last] + 1, step])
        index = last + 1
    return found


def _ranges(stretches: Sequence[Sequence[int]]) -> list[range]:
    return [range(*stretch) for stretch in stretches]


def _tried(occasion: str, value_of: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """Return the value, or the error in words where there is none."""
    try:
        return value_of(), None
    except Exception as error:
        return None, _in_words(occasion, error)


def _in_words(occasion: str, error: Exception) -> Exception:
    """Return *error*, wrapped in a CheckpointError when it is an OSError."""
    if not isinstance(error, OSError):
        return error
    failure = CheckpointError(f"{occasion} failed: {error}")
    failure.__cause__ = error
    return failure


def _here() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _group(ranks: tuple[int, ...] | None) -> dist.ProcessGroup | None:
    """Return the process group of *ranks*, created on first use by its members only; None for the default group."""
    if ranks is None or len(ranks) == _world():
        return None

    def make() -> dist.ProcessGroup:
        made: dist.ProcessGroup = dist.new_group(
            list(ranks), timeout=timeout_of_group(), use_local_synchronization=True
        )
        return made

    return live.kept(ranks, make)
