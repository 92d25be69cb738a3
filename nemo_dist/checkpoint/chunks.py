"""The chunks of this rank's tensors: what they are, as all ranks must know it, and how to assemble a whole tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from nemo_dist.checkpoint import holdings
from nemo_dist.checkpoint.holdings import Entry, Held, Holding
from nemo_dist.checkpoint.layout import Chunk, Cut, Layout, chunks_at
from nemo_dist.checkpoint.save_plan import SavePlan
from nemo_dist.errors import PluginError
from nemo_dist.mesh.dtensor import local
from nemo_dist.mesh.rank_group import RankGroup
from nemo_dist.plugin.mixed_precision import dtype_name
from nemo_dist.torch_private import spec_of

Axes = tuple[tuple[int, int], ...]  # (size, stride) of each axis of a mesh
Shares = Sequence[tuple[Sequence[range], str]]  # texts of the ranks, each once, with the ranks that have it


def chunks(tensor: Tensor) -> Iterator[tuple[Chunk, Tensor]]:
    """Yield the chunks of *tensor* that this rank holds, each with a view of its values; no communication."""
    if not isinstance(tensor, DTensor):
        found = chunks_at(tuple(tensor.shape), (), ())
        part = tensor.detach()
    else:
        part = tensor.to_local().detach()
        sizes = tuple((size, 1) for size in tensor.device_mesh.shape)
        coordinates = tensor.device_mesh.get_coordinate()
        if part.numel() == 0 or coordinates is None:
            return
        cuts = _cuts(tensor.placements, sizes, tensor.dim())
        found = chunks_at(tuple(tensor.shape), tuple(cuts.values()), tuple(coordinates[axis] for axis in cuts))
        _check_local(tensor, part, found)
    for chunk, own in found:
        yield chunk, own.of(part)


def _cuts(placements: Sequence[Any], axes: Axes, ndim: int) -> dict[int, Cut]:
    """Return the cuts of *placements* by the mesh axis that makes them; raise PluginError for a partial placement."""
    found = {}
    for axis, (placement, (size, stride)) in enumerate(zip(placements, axes, strict=True)):
        if placement.is_partial():
            raise PluginError(f"a tensor of the state is {placements} on its mesh; reduce it before it is saved")
        if hasattr(placement, "dim") and size > 1:
            found[axis] = Cut(placement.dim % ndim, size, stride, getattr(placement, "split_factor", 1))
    return found


def _check_local(tensor: DTensor, part: Tensor, found: Sequence[tuple[Chunk, Chunk]]) -> None:
    """Raise PluginError for a local tensor of another size than its placements give."""
    for dim, size in enumerate(part.shape):
        held = max((own.offsets[dim] + own.sizes[dim] for _, own in found), default=0)
        if held != size:
            raise PluginError(
                f"a tensor of shape {tuple(tensor.shape)} as {tensor.placements} should have {held} of dim {dim} on "
                f"this rank, but has {size}; export_state must bring it to the layout that it declares"
            )


def described(state: Mapping[str, Tensor], ranks: RankGroup) -> dict[str, Held]:
    """Return what this rank holds of each tensor; no communication.

    Raises PluginError for a tensor whose local size is not that of its placements.
    """
    rank = ranks.rank
    axes: dict[int, Axes | None] = {}
    layouts: dict[Any, Layout] = {}
    found = {}
    for name, tensor in state.items():
        shape, dtype = tuple(tensor.shape), dtype_name(tensor.dtype)
        if not isinstance(tensor, DTensor):
            found[name] = Held(shape, dtype, Layout())
            continue
        mesh = tensor.device_mesh
        if id(mesh) not in axes:
            axes[id(mesh)] = _axes(mesh, ranks)
        regular, part = axes[id(mesh)], tensor.to_local()
        if regular is not None and tensor.dim():
            which = (id(mesh), tensor.placements, tensor.dim())
            if which not in layouts:
                layouts[which] = Layout(tuple(_cuts(tensor.placements, regular, tensor.dim()).values()))
            own = layouts[which].chunks_of(shape, rank)
            if bool(own) == bool(part.numel()):
                if own:
                    _check_local(tensor, part, own)
                found[name] = Held(shape, dtype, layouts[which])
                continue
        found[name] = Held(shape, dtype, None, tuple(chunk for chunk, _ in chunks(tensor)))
    return found


def _axes(mesh: DeviceMesh, ranks: RankGroup) -> Axes | None:
    """Return size and stride of the axes of *mesh*, in places of *ranks*; None for a mesh that these do not describe.

    They describe it when the coordinate of every rank on an axis is its place divided by the stride, modulo the size.
    """
    grid = mesh.mesh.to(torch.int64)
    if ranks.ranks is not None:
        members = torch.tensor(ranks.ranks, device="cpu")
        places = torch.searchsorted(members, grid.contiguous()).clamp(max=len(members) - 1)
        if not torch.equal(members[places], grid):
            return None
        grid = places
    found = []
    for dim, size in enumerate(grid.shape):
        stride = int(grid.select(dim, 1).flatten()[0] - grid.flatten()[0]) if size > 1 else 1
        coordinates = torch.arange(size, device="cpu").view(-1, *(1,) * (grid.dim() - dim - 1)).expand_as(grid)
        if stride < 1 or not torch.equal(grid // stride % size, coordinates):
            return None
        found.append((size, stride))
    return tuple(found)


@attrs.define(eq=False)
class Planner:
    """Plans saves, and keeps the last plan: most saves are of the same tensors as the one before."""

    _looks: Any = None
    _described: tuple[dict[str, Held], str] = ({}, "")
    _shares: Any = None
    _plan: SavePlan | None = None

    def describe(self, state: Mapping[str, Tensor], ranks: RankGroup) -> str:
        """Return in a text what this rank holds of *state*; errors as of ``described``."""
        with torch.no_grad():  # so that to_local makes no new tensor
            return self.describe_as((ranks, _seen(state)), lambda: described(state, ranks))

    def describe_as(self, looks: Any, describe: Callable[[], dict[str, Held]]) -> str:
        """Return in a text what *describe* returns; it is not called where *looks* equals that of the last time."""
        if looks != self._looks:
            held = describe()
            self._described = held, json.dumps(holdings.to_json(held), separators=(",", ":"))
            self._looks = looks
        return self._described[1]

    @property
    def held(self) -> Mapping[str, Held]:
        """What this rank holds, as it was last described."""
        return self._described[0]

    def plan(self, shares: Shares, rank: int, even: bool = True) -> SavePlan:
        """Return the plan for *shares*, the texts of all ranks, of which ``describe`` gave this rank's.

        *even* as of ``SavePlan.of``; it is the same in all calls.
        """
        if self._plan is None or shares != self._shares:
            self._plan = SavePlan.of(self.holdings(shares), rank, even)
            self._shares = shares
        return self._plan

    def holdings(self, shares: Shares) -> list[Holding]:
        """Return what the ranks hold, as *shares* say."""
        held, own = self._described
        return [Holding(ranks, held if text == own else holdings.from_json(json.loads(text))) for ranks, text in shares]


def _seen(state: Mapping[str, Tensor]) -> list[Any]:
    """Return all that ``described`` looks at; briefly, as every save asks it of all tensors."""
    return [(name, spec_of(tensor), (part := local(tensor)).shape, part.dtype) for name, tensor in state.items()]


def pieces_of(state: Mapping[str, Tensor], plan: SavePlan) -> dict[str, Tensor]:
    """Return the values, as views, of the pieces that *plan* has this rank write, by their labels."""
    found = {}
    with torch.no_grad():
        for piece in plan.pieces:
            tensor = state[piece.name]
            if piece.local is None:
                found[piece.label] = dict(chunks(tensor))[piece.chunk]
            else:
                part = local(tensor)
                found[piece.label] = piece.local.of(part.detach() if part.requires_grad else part)
    return found


def survey(
    ranks: RankGroup, occasion: str, state_of: Callable[[], Mapping[str, Tensor]]
) -> tuple[dict[str, Tensor], dict[str, Entry]]:
    """Return this rank's state, from *state_of*, and all tensors of it over all *ranks*; collective.

    Raises on all ranks when *state_of* fails on one, or the chunks of a tensor do not make the whole.
    """
    planner = Planner()
    state: dict[str, Tensor] = {}

    def describe() -> str:
        state.update(state_of())
        return planner.describe(state, ranks)

    shares = ranks.distinct(occasion, describe)
    return state, holdings.entries_of(planner.holdings(shares))


def assemble(
    ranks: RankGroup,
    wanted: Sequence[Iterable[str]],
    state: Mapping[str, Tensor],
    entries: Mapping[str, Entry],
    dtypes: Mapping[str, torch.dtype],
) -> dict[str, Tensor]:
    """Return the whole tensors ``wanted[ranks.rank]`` on the CPU, in *dtypes*; collective over *ranks*.

    ``wanted[r]`` are the names that rank r asks for, and is equal on every rank. One all-to-all moves the chunks for
    all ranks: each chunk is sent by one of its holders, by the receiver itself where it holds it.
    """
    outgoing: list[list[Tensor]] = [[] for _ in wanted]
    incoming: list[list[tuple[str, Chunk]]] = [[] for _ in wanted]
    held = {name: dict(chunks(state[name])) for names in wanted for name in names if name in state}
    for owner, names in enumerate(wanted):
        for name in names:
            for chunk, holders in entries[name].holders.items():
                sender = owner if owner in holders else holders[owner % len(holders)]
                if sender == ranks.rank:
                    outgoing[owner].append(as_bytes(held[name][chunk].to(dtypes[name])))
                if owner == ranks.rank:
                    incoming[sender].append((name, chunk))
    sizes = [sum(chunk.numel * dtypes[name].itemsize for name, chunk in parts) for parts in incoming]
    received = ranks.exchange(outgoing, sizes)
    whole = {name: torch.empty(entries[name].shape, dtype=dtypes[name], device="cpu") for name in wanted[ranks.rank]}
    for buffer, parts in zip(received.split(sizes), incoming, strict=True):
        start = 0
        for name, chunk in parts:
            stop = start + chunk.numel * dtypes[name].itemsize
            chunk.of(whole[name]).copy_(buffer[start:stop].clone().view(dtypes[name]).view(chunk.sizes))
            start = stop
    return whole


def as_bytes(tensor: Tensor) -> Tensor:
    """Return the values of *tensor*, in row-major order, as a 1-D uint8 tensor; a view where *tensor* is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
