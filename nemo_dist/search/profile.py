"""Measure a step of a model on one rank of a mesh that is not there: torch's fake process group, and fake tensors.

The hooks of all plugins but the strategy and what splits layers run as in a load, on a model with few layers, and so
does a forward and a backward of one row. What was counted is kept for every kind of block, and for what stands before
and after all blocks.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nemo_dist import hf_model
from nemo_dist.errors import RankError
from nemo_dist.mesh.mesh_context import MeshContext
from nemo_dist.planning.mesh_plan import MeshPlan, Role
from nemo_dist.planning.sizes import ParallelismSizes
from nemo_dist.plugin.hook_caller import PluginCalls
from nemo_dist.plugin.protocol import Stage, claimant, declared
from nemo_dist.search.enumeration import Topology
from nemo_dist.search.model import Kind, SearchedModel, kinds
from nemo_dist.search.tracing import Counts, OperatorCounter, without_storage
from nemo_dist.setup.setup import DistributedSetup
from nemo_dist.torch_private import dtensor_of

_WORDS = 3  # token ids of the batch are smaller


@attrs.frozen(kw_only=True)
class Profile:
    """What one row costs on one rank, forward and backward: ``before`` all blocks, a block by kind, and ``after`` them.

    ``held`` of each is what it keeps for the backward. ``hidden``: the bytes of the hidden states that enter the
    blocks; the rest of ``before`` every stage of a pipeline makes for itself. ``working``: how much more there is at
    the worst moment. Sent bytes are by axis. ``ep``: how many ranks share the experts.
    """

    before: Counts
    hidden: int
    after: Counts
    blocks: Mapping[Kind, Counts]
    working: int
    ep: int = 1


@attrs.frozen
class Inner:
    """The part of a topology that a profile depends on; ``key`` tells profiles apart."""

    sizes: ParallelismSizes
    world_size: int
    strategy: Any
    mode: bool | str
    plugins: tuple[Any, ...]
    length: int

    @classmethod
    def of(cls, topology: Topology, length: int) -> Inner:
        """Return it for *topology*: without axes that split layers or only repeat what ranks do."""
        asked, plan = topology.parallelism_sizes, topology.plan
        layers = {"pp", *asked.own_axes(Role.LAYERS)}
        kept = {axis: size for axis, size in asked.extra.items() if axis not in layers}
        sizes = ParallelismSizes(tp_size=asked.tp_size, cp_size=asked.cp_size, ep_size=asked.ep_size, extra=kept)
        sizes = sizes.with_roles(asked.roles)
        ranks = sizes.model_size * (asked.ep_size // math.gcd(asked.ep_size, sizes.model_size))
        gone = {
            plugin.name
            for plugin in topology.selected
            for axis in layers
            if claimant([plugin], axis) and plan.size(axis) > 1
        }
        plugins = tuple(
            plugin
            for plugin in topology.plugins
            if getattr(plugin, "plugin", getattr(plugin, "name", None)) not in gone
        )
        return cls(sizes, ranks, topology.strategy, topology.activation_checkpointing, plugins, length)

    @property
    def axes(self) -> frozenset[str]:
        """The axes whose collectives a trace counts."""
        sizes = {"tp": self.sizes.tp_size, "cp": self.sizes.cp_size, "ep": self.sizes.ep_size, **self.sizes.extra}
        return frozenset(axis for axis, size in sizes.items() if size > 1)

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells it from others."""
        return self.sizes, self.world_size, repr(self.strategy), self.mode, repr(self.plugins), self.length


@contextmanager
def fake_ranks(count: int) -> Iterator[None]:
    """Be the first of *count* ranks that are not there; raise RankError in a process that has a process group."""
    if dist.is_initialized():
        raise RankError("a search makes a process group of its own; run it in a process without one")
    dist.init_process_group("fake", rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


def profile(model: SearchedModel, inner: Inner) -> Profile:
    """Return what one row of ``inner.length`` tokens costs on a rank; raise what the plugins refuse the model with."""
    setup = DistributedSetup.build(
        strategy=inner.strategy,
        parallelism_sizes=inner.sizes,
        activation_checkpointing=inner.mode,
        plugins=inner.plugins,
        world_size=inner.world_size,
        device_type="cpu",
    )
    acting = [plugin for plugin in setup.plugins if plugin.stage != Stage.DATA]
    slim = copy.deepcopy(model.slim)
    with fake_ranks(inner.world_size):
        mesh = MeshContext.realise(setup.plan, None, "cpu", None)
        run = _Run(slim, PluginCalls(acting), mesh, setup.plan, declared(setup.strategy, "compute_dtype"))
        return attrs.evolve(run.profile(inner.length), ep=inner.sizes.ep_size)


@attrs.frozen(eq=False)
class _Run:
    """One forward and backward of *model* with the plugins behind *calls*, computing in *dtype*."""

    model: Any
    calls: PluginCalls
    mesh: MeshContext
    plan: MeshPlan
    dtype: str | None

    def profile(self, length: int) -> Profile:
        """Return the counts of one row of *length* tokens."""
        own = kinds(self.model)
        parts: list[nn.Module] = [self.model]
        for _ in self.calls.each("shard", parts=parts, mesh=self.mesh, plan=self.plan):
            pass
        answers = self.calls.each("runtime", parts=parts, mesh=self.mesh, plan=self.plan, model=self.model)
        rewrites = [part.batch for _, part in answers if part is not None and part.batch is not None]
        with without_storage():
            known = _materialise(self.model, getattr(torch, self.dtype) if self.dtype else None)
            batch: Any = {name: torch.ones((1, length), dtype=torch.long) * _WORDS for name in ("input_ids", "labels")}
            counter = OperatorCounter(known, max(1, self.mesh.ep_size))
            marks = _Marks(counter)
            marks.watch(self.model)
            with counter:
                for rewrite in rewrites:
                    batch = rewrite(batch)
                loss = parts[0](**batch, use_cache=False).loss
                del batch
                counter.sweep()
                marks.forward_end(counter.counts.copy())
                loss.backward()
                del loss
        axes = self._axes()
        return marks.profile(own, counter, axes)

    def _axes(self) -> dict[str, str]:
        """Return the axis of every process group, by the group's name."""
        found: dict[str, str] = {}
        for axis in self.plan.wide:
            group = self.mesh.group(axis.name)
            if group is not None:
                found[group.group_name] = axis.name
        return found


def _materialise(model: nn.Module, dtype: torch.dtype | None) -> list[Tensor]:
    """Give the tensors of *model* the CPU as device, without storage, and return them; parameters get *dtype*."""
    made: dict[int, Tensor] = {}
    known: list[Tensor] = []

    def parameter(found: Tensor) -> Tensor:
        part = found.to_local() if isinstance(found, DTensor) else found
        kind = dtype if dtype is not None and part.is_floating_point() else part.dtype
        local = torch.empty(part.shape, dtype=kind)
        known.append(local)
        whole = local
        if isinstance(found, DTensor):
            like = torch.empty_strided(found.shape, found.stride(), dtype=kind, device="meta")
            whole = dtensor_of(local, found.device_mesh, found.placements, like)
        fresh = nn.Parameter(whole, requires_grad=found.requires_grad)
        if fresh.requires_grad:
            fresh.register_post_accumulate_grad_hook(_drop)
        return fresh

    for module in model.modules():
        for name, found in list(module._parameters.items()):
            if found is not None:
                if id(found) not in made:
                    made[id(found)] = parameter(found)
                module._parameters[name] = made[id(found)]  # type: ignore[assignment]
        for name, buffer in [*module._buffers.items(), *vars(module).items()]:
            if isinstance(buffer, Tensor) and name not in module._parameters:
                fresh = torch.zeros(buffer.shape, dtype=buffer.dtype)
                known.append(fresh)
                if name in module._buffers:
                    module._buffers[name] = fresh
                else:
                    setattr(module, name, fresh)
    return known


def _drop(parameter: Tensor) -> None:
    parameter.grad = None  # gradients of parameters are counted apart


@attrs.define(eq=False)
class _Marks:
    """The counts at the border between blocks, in the forward and in the backward."""

    counter: OperatorCounter
    forward: list[tuple[str, str, Counts]] = attrs.field(factory=list)
    backward: dict[tuple[str, str], Counts] = attrs.field(factory=dict)
    end: Counts | None = None
    hidden: int = 0

    def watch(self, model: Any) -> None:
        """Note the counts around every block of *model*."""
        for name, block in hf_model.blocks(model).items():
            block.register_forward_pre_hook(self._enter(name), with_kwargs=True)
            block.register_forward_hook(self._leave(name))

    def _enter(self, name: str) -> Any:
        def hook(_: Any, args: Any, kwargs: Any) -> None:
            self._note(name, "in", args[0] if args else next(iter(kwargs.values())))

        return hook

    def _leave(self, name: str) -> Any:
        def hook(_: Any, args: Any, output: Any) -> None:
            self._note(name, "out", output[0] if isinstance(output, tuple) else output)

        return hook

    def _note(self, name: str, where: str, hidden: Tensor) -> None:
        if self.end is not None:
            return  # recomputation
        self.counter.sweep()
        self.hidden = self.hidden or hidden.nbytes
        self.forward.append((name, where, self.counter.counts.copy()))
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: self._back(name, where))

    def _back(self, name: str, where: str) -> None:
        self.backward[name, where] = self.counter.counts.copy()

    def forward_end(self, counts: Counts) -> None:
        """Note that the forward has ended."""
        self.end = counts

    def profile(self, own: Mapping[str, Kind], counter: OperatorCounter, axes: Mapping[str, str]) -> Profile:
        """Return the counts by kind of block, with the axis in place of the name of every group."""
        total, end = counter.counts, self.end or Counts()
        entries = {(name, where): counts for name, where, counts in self.forward}
        names = list(dict.fromkeys(name for name, _, _ in self.forward))
        costs = {name: _cost(entries[name, "out"] - entries[name, "in"], self._between(name)) for name in names}
        first, last = names[0], names[-1]
        blocks: dict[Kind, list[Counts]] = {}
        for name in (*names[1:-1], first, last):
            if name not in (first, last) or own[name] not in blocks:
                blocks.setdefault(own[name], []).append(costs[name])
        usual = {kind: _mean(found) for kind, found in blocks.items()}
        back_in, back_out = self.backward.get((first, "in"), total), self.backward.get((last, "out"), end)
        before = _cost(entries[first, "in"], total - back_in)
        after = _cost(end - entries[last, "out"], back_out - end)
        if first != last:  # what the first and the last block do more than others is around all blocks
            before, after = before + costs[first] - usual[own[first]], after + costs[last] - usual[own[last]]
        return Profile(
            before=_by_axis(before, axes),
            hidden=self.hidden,
            after=_by_axis(after, axes),
            blocks={kind: _by_axis(found, axes) for kind, found in usual.items()},
            working=max(0, counter.peak - end.held),
        )

    def _between(self, name: str) -> Counts:
        start, stop = self.backward.get((name, "out")), self.backward.get((name, "in"))
        return stop - start if start is not None and stop is not None else Counts()


def _cost(there: Counts, back: Counts) -> Counts:
    """Return forward and backward together, and what the forward keeps."""
    return attrs.evolve(there + back, held=there.held)


def _mean(found: list[Counts]) -> Counts:
    total, count = sum(found[1:], found[0]), len(found)
    return Counts(
        flops=total.flops // count,
        moved=total.moved // count,
        sent=Counter({key: value // count for key, value in total.sent.items()}),
        collectives=Counter({key: -(-value // count) for key, value in total.collectives.items()}),
        held=total.held // count,
    )


def _by_axis(counts: Counts, axes: Mapping[str, str]) -> Counts:
    sent: Counter[str] = Counter()
    collectives: Counter[str] = Counter()
    for group, value in counts.sent.items():
        sent[axes.get(group, group)] += value
        collectives[axes.get(group, group)] += counts.collectives[group]
    return attrs.evolve(counts, sent=sent, collectives=collectives)
