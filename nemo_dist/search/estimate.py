"""Estimate memory and time of a step under a topology; every figure says how it came about.

Parameters, gradients and optimizer state are what the plugins' ``memory`` hooks say, to the byte. Activations, FLOPs
and what is sent along the axes inside of a layer are counted in a trace (``profile``); the idle time of a pipeline
comes from its schedule, and what a strategy sends from its ``traffic`` hook. Rates are those of the hardware file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any

import attrs

from nemo_dist.errors import PluginError
from nemo_dist.planning.mesh_plan import Role
from nemo_dist.planning.sizes import ParallelismSizes
from nemo_dist.plugin.comm_estimate import ModelFacts
from nemo_dist.plugin.hook_caller import PluginCalls
from nemo_dist.plugin.memory_estimate import RankShare, StageShare
from nemo_dist.plugin.protocol import Plugin, declared, strategy_of
from nemo_dist.search.enumeration import Topology
from nemo_dist.search.hardware import Hardware
from nemo_dist.search.model import SearchedModel
from nemo_dist.search.profile import Inner, Profile, profile
from nemo_dist.search.tracing import Counts
from nemo_dist.setup.rank_memory import divide

_UPDATE_PASSES = 7  # AdamW reads a parameter, its gradient and moments, and writes all but the gradient
HOW: Mapping[str, str] = {
    "parameters": "shapes from the plugins, to the byte",
    "gradients": "as large as the parameters, to the byte",
    "optimizer state": "AdamW: two moments in the dtype of the parameters and a count of steps, to the byte",
    "activations": "counted in a trace of one row, for the microbatches that the schedule holds at once",
    "logits, loss and one backward": "the highest point of that trace above the activations",
}
NOT_COUNTED = "the allocator's fragmentation, the device's context, buffers of NCCL, and what a data loader holds"


@attrs.frozen(kw_only=True)
class Estimate:
    """What a step under ``topology`` takes: bytes of the fullest rank by kind, and seconds by kind.

    ``rows``: in one forward; ``forwards``: of a rank in a step. ``stage``: the pipeline rank that is fullest.
    ``mfu``: the FLOPs that the model needs, of those that the devices could do in the time.
    """

    topology: Topology
    rows: int
    forwards: int
    memory: Mapping[str, int]
    stage: int
    times: Mapping[str, float]
    tokens: int
    mfu: float

    @property
    def bytes(self) -> int:
        """The bytes of the fullest rank."""
        return sum(self.memory.values())

    @property
    def seconds(self) -> float:
        """The time of a step."""
        return sum(self.times.values())

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second and device."""
        return self.tokens / self.seconds / self.topology.world_size


@attrs.frozen(kw_only=True, eq=False, slots=False)
class Estimator:
    """Estimates for one model: ``batch`` sequences of ``length`` tokens in a step, over all ranks.

    ``imbalance``: how many times its even share of tokens the fullest rank of experts gets, where ``ep`` shares them.
    """

    model: SearchedModel
    hardware: Hardware
    batch: int
    length: int
    imbalance: float = 1.25
    profiles: dict[Any, Profile | Exception] = attrs.field(factory=dict)
    _inside: dict[Any, PluginCalls] = attrs.field(factory=dict)

    def rows_of(self, topology: Topology) -> int:
        """Return the sequences of one data-parallel rank; 0 where they do not divide."""
        ways = topology.plan.splitting(Role.BATCH)
        return self.batch // ways if self.batch % ways == 0 else 0

    def shares(self, topology: Topology, rows: int) -> list[RankShare]:
        """Return what ranks hold with *rows* rows in a forward, as the plugins say; raise what they refuse with.

        Raises PluginError for a strategy that cannot say it.
        """
        whole = RankShare.whole(self.model.whole, rows, self.length)
        whole.forwards = max(1, self.rows_of(topology) // rows)
        strategy, facts = strategy_of(topology.selected), self.facts(topology, 1)
        return divide(whole, topology.calls, strategy, topology.plan, facts, self.model.whole)

    def facts(self, topology: Topology, batches: int) -> ModelFacts:
        """Return the numbers that plugins estimate with, for the rows of one data-parallel rank."""
        dtype = declared(strategy_of(topology.selected), "compute_dtype")
        known = self._facts.setdefault(dtype, None) or self._facts_of(dtype)
        mode = topology.activation_checkpointing
        return attrs.evolve(
            known, rows=self.rows_of(topology), recomputes=mode is True or mode == "full", batches=batches
        )

    @cached_property
    def _facts(self) -> dict[str | None, ModelFacts | None]:
        return {}

    def _facts_of(self, dtype: str | None) -> ModelFacts:
        found = ModelFacts.of(self.model.whole, 1, self.length, dtype, False)
        self._facts[dtype] = found
        return found

    # ---- memory ----

    def memory(self, rank: RankShare, found: Profile) -> dict[str, int]:
        """Return the bytes of *rank* by kind."""
        held = sum(stage.alive * self._held(stage, found) for stage in rank.stages) * rank.rows
        return {
            **rank.held,
            "activations": round(held),
            "logits, loss and one backward": found.working * rank.rows,
        }

    def _held(self, stage: StageShare, found: Profile) -> float:
        made = 0 if stage.first else found.before.held - found.hidden  # the buffers of a pipeline have what it receives
        segments = self._segments(stage, found)
        return made + sum(count.held * more for count, more in segments)

    def _segments(self, stage: StageShare, found: Profile) -> Iterable[tuple[Counts, float]]:
        """Yield the counts of everything in *stage*, and how many times that the fullest rank of experts has.

        A rank that has all experts gets the tokens of all of them, which is its even share.
        """
        if stage.first:
            yield found.before, 1.0
        for name in stage.blocks:
            kind = self.model.kinds[name]
            yield found.blocks[kind], self.imbalance if found.ep > 1 and kind in self.model.routed else 1.0
        if stage.last:
            yield found.after, 1.0

    # ---- time ----

    def sent(self, rank: RankShare, found: Profile) -> Counter[str]:
        """Return the bytes that *rank* sends in a step along each axis whose collectives are within layers."""
        total: Counter[str] = Counter()
        for stage in rank.stages:
            for counts, _ in self._segments(stage, found):
                for axis, sent in counts.sent.items():
                    total[axis] += sent * rank.rows * rank.forwards
        return total

    def profile_of(self, topology: Topology) -> Profile:
        """Return the trace that *topology* needs; raise what a plugin refused it with."""
        return self._profile(Inner.of(topology, self.length))

    def _profile(self, inner: Inner) -> Profile:
        if inner.key not in self.profiles:
            try:
                self.profiles[inner.key] = profile(self.model, inner)
            except ValueError as refusal:
                self.profiles[inner.key] = refusal
            except Exception as error:  # whatever the code of a model does on tensors without storage
                self.profiles[inner.key] = PluginError(f"no trace of its step ({type(error).__name__}: {error})")
        found = self.profiles[inner.key]
        if isinstance(found, Exception):
            raise found
        return found

    @cached_property
    def flops(self) -> int:
        """The FLOPs of the model, forward and backward, for the whole batch; nothing is recomputed."""
        found = self._profile(Inner(ParallelismSizes(), 1, "default", False, (), self.length))
        whole = StageShare(blocks=tuple(self.model.kinds))
        return self.batch * sum(counts.flops for counts, _ in self._segments(whole, found))

    def times(self, topology: Topology, ranks: list[RankShare], found: Profile) -> dict[str, float]:
        """Return the seconds of a step by kind, those of the slowest pipeline rank."""
        slowest = max((self._rank_times(topology, rank, found) for rank in ranks), key=lambda t: sum(t.values()))
        rank = ranks[0]
        busy = sum(slowest.values())
        waits = busy * rank.idle / (1 - rank.idle)
        # What a strategy gathers and reduces runs beside the computation, in a pipeline beside one microbatch.
        window = busy / rank.forwards if len(ranks) > 1 else busy
        shared = self._strategy_seconds(topology, rank)
        update = max(rank.states["gradients"] for rank in ranks) * _UPDATE_PASSES / self._bandwidth
        return {
            **slowest,
            "pipeline idle": waits,
            "strategy's collectives beyond the computation": max(0.0, shared - window),
            "optimizer": update,
        }

    @property
    def _bandwidth(self) -> float:
        return self.hardware.memory_bandwidth * self.hardware.memory_efficiency

    def _rank_times(self, topology: Topology, rank: RankShare, found: Profile) -> dict[str, float]:
        """Return the seconds that *rank* computes and exchanges within layers, which nothing overlaps."""
        dtype = self.dtype(topology)
        times = {"matrix products": 0.0, "other operators": 0.0}
        for stage in rank.stages:
            for counts, more in self._segments(stage, found):
                times["matrix products"] += more * rank.rows * counts.flops / self.hardware.matrix_flops(dtype)
                times["other operators"] += more * rank.rows * counts.moved / self._bandwidth
                for axis, sent in counts.sent.items():
                    if axis in topology.plan.dense or any(axis in view for view in topology.plan.views):
                        name = f"{axis} collectives"
                        seconds = self.hardware.seconds(
                            topology.plan, axis, more * rank.rows * sent, counts.collectives[axis]
                        )
                        times[name] = times.get(name, 0.0) + seconds
        return {name: seconds * rank.forwards for name, seconds in times.items()}

    def dtype(self, topology: Topology) -> str:
        """Return the name of the dtype that a forward computes in."""
        return declared(strategy_of(topology.selected), "compute_dtype") or self.model.dtype

    def _strategy_seconds(self, topology: Topology, rank: RankShare) -> float:
        """Return how long what plugins send beside the layers takes: parameters and gradients."""
        plan = topology.plan
        traced = {*Inner.of(topology, self.length).axes, "pp"}
        batches = rank.forwards if plan.splitting(Role.LAYERS) == 1 else 1
        facts = self.facts(topology, batches)
        groups = max(1, len(self.model.kinds) // plan.splitting(Role.LAYERS)) * batches
        total = 0.0
        calls = self._beside(topology.selected, traced)
        for entries in calls.traffic(plan=plan, facts=facts, model=None):
            for entry in entries:
                if entry.axis not in traced and entry.sent is not None:
                    total += self.hardware.seconds(plan, entry.axis, entry.sent, groups)
        return total

    def _beside(self, plugins: tuple[Plugin, ...], traced: set[str]) -> PluginCalls:
        """Return the calls of those plugins that send along other axes than the *traced* ones."""
        key = tuple(map(id, plugins))
        if key not in self._inside:
            self._inside[key] = PluginCalls([plugin for plugin in plugins if not plugin.axes <= traced])
        return self._inside[key]

    # ---- together ----

    def estimate(self, topology: Topology, most: int, fits: Callable[[int], bool]) -> Estimate:
        """Return the estimate with the rows in a forward, at most *most*, that fit and take the least time.

        With one row when none fit. In a pipeline they are the rows of a microbatch.
        """
        found, rows = self.profile_of(topology), self.rows_of(topology)
        chosen: Estimate | None = None
        refusal: ValueError | None = None
        for size in (2**power for power in range(most.bit_length())):
            if size > most or rows % size:
                break
            try:
                one = topology.with_rows(size)
                estimate = self._of(one, self.shares(one, size), found)
            except ValueError as error:  # a schedule that needs more microbatches
                refusal = error
                break
            if chosen is not None and not fits(estimate.bytes):
                break
            if chosen is None or estimate.seconds < chosen.seconds:
                chosen = estimate
        if chosen is None:
            raise refusal or ValueError("no rows")
        return chosen

    def _of(self, topology: Topology, ranks: list[RankShare], found: Profile) -> Estimate:
        held = [self.memory(rank, found) for rank in ranks]
        fullest = max(range(len(held)), key=lambda place: sum(held[place].values()))
        times = self.times(topology, ranks, found)
        peak = self.hardware.peak(self.dtype(topology)) * topology.world_size
        return Estimate(
            topology=topology,
            rows=ranks[0].rows,
            forwards=ranks[0].forwards,
            memory=held[fullest],
            stage=fullest,
            times=times,
            tokens=self.batch * self.length,
            mfu=self.flops / sum(times.values()) / peak,
        )
