"""The laws of the conformance kit on training: what one process computes, alone, composed, and side by side."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from nemo_dist.plugin.protocol import declared
from nemo_dist.testing import conformance_runs as runs
from nemo_dist.testing import laws
from nemo_dist.testing.conformance_cases import Case, Untried, composed_cases
from nemo_dist.testing.conformance_runs import Stretch
from nemo_dist.testing.equivalence import (
    TOLERANCE,
    Task,
    checkpoint,
)
from nemo_dist.testing.kit import Kit, Ranks, close
from nemo_dist.testing.precision import in_float32
from nemo_dist.testing.selecting import default_strategy
from nemo_dist.testing.temp_folders import scratch
from nemo_dist.testing.tiny_models import SPECIMENS, first_modules, tied_twin


class TrainingLaws(Kit):
    """The tests of whole training runs."""

    def test_it_computes_what_one_process_computes(self, ranks: Ranks) -> None:
        """Losses, gradients, unclipped norms and the parameters after three AdamW steps equal those of one process."""
        self._compare(laws.PARITY, ranks, self.task())

    def test_it_accumulates_what_one_process_computes(self, ranks: Ranks) -> None:
        """Training with gradient accumulation over three batches per step equals training on one process."""
        self._compare(laws.ACCUMULATES, ranks, self.task(accumulate=3))

    def test_it_trains_beside_frozen_parameters(self, ranks: Ranks) -> None:
        """Parameters that are frozen after loading stay, and the others train as on one process."""
        frozen = first_modules(self.specimen)
        if not frozen:
            pytest.skip(f"{self.specimen!r} has neither repeated blocks nor an embedding to freeze")
        self._compare(laws.FROZEN, ranks, self.task(frozen=(*self.frozen, *frozen)))

    def test_it_trains_a_tied_weight_as_one(self, ranks: Ranks) -> None:
        """An output head that is tied to the embedding gets the gradients of both."""
        tied = tied_twin(self.specimen)
        if tied is None:
            pytest.skip(f"{self.specimen!r} has an output head of its own, and no twin whose head is tied")
        self._compare(laws.TIED, ranks, self.task(specimen=tied))

    def test_it_composes_with_what_it_says(self, ranks: Ranks) -> None:
        """Training equals that of one process on twice the ranks, and with every axis and strategy it composes with.

        A plugin beside a strategy is tried with every axis that ``build`` accepts: what is not exact it must refuse.
        """
        unable = [str(one) for one in self.untried()]
        for case in self.cases():
            task, pool = self.task(specimen=case.specimen, adapters=case.adapters), ranks(case.world)
            weights = checkpoint(task.specimen, task.seed)
            alone = {"strategy": in_float32(case.strategy or default_strategy())}
            with laws.COMPOSES.judging(self.plugin):
                if case.strategy and all(pool.run(runs.on_rank_refusal, task, weights, alone, (RuntimeError,))):
                    unable.append(f"{case.strategy!r} (this machine cannot run it)")
                elif case.named or not all(pool.run(runs.on_rank_refusal, task, weights, case.build)):
                    self._compare(laws.COMPOSES, ranks, task, case)
        if unable:
            pytest.skip(f"not tried: {', '.join(unable)}; what else it composes with is as it should be")

    def cases(self) -> Sequence[Case]:
        """Return the setups that ``test_it_composes_with_what_it_says`` trains in."""
        return [one for one in self._composed() if isinstance(one, Case)]

    def untried(self) -> Sequence[Untried]:
        """Return what the plugin says of itself that this test cannot try, each with the reason."""
        return [one for one in self._composed() if isinstance(one, Untried)]

    def _composed(self) -> Sequence[Case | Untried]:
        return composed_cases(self.plugin_type, self.selecting(), self.world, self.specimen)

    def test_it_leaves_nothing_behind(self, ranks: Ranks) -> None:
        """A closed runtime leaves no groups or threads, and plain models compute as before."""
        task = self.task()
        with laws.LEAVES_NOTHING.judging(self.plugin):
            found = ranks(self.world).run(runs.on_rank_repeat, task, checkpoint(task.specimen), self.selecting())
        plain = _plain_loss(task)
        lines = []
        for rank, left in enumerate(found):
            for what, (first, last) in (("process groups", left.groups), ("threads", left.threads)):
                lines += [f"rank {rank}: {first} {what} after the first runtime, {last} after the third"] * (
                    last > first
                )
            lines += [f"rank {rank}: a plain model's loss is {left.plain_loss}, expected {plain}"] * (
                not abs(left.plain_loss - plain) <= TOLERANCE * abs(plain)
            )
        laws.LEAVES_NOTHING.hold(self.plugin, lines)

    def test_two_setups_train_side_by_side(self, ranks: Ranks) -> None:
        """Two setups in one process, with other weights and batches, give the numbers of each alone."""
        tasks = [self.task(), self.task(seed=1)]
        folders = [checkpoint(task.specimen, task.seed) for task in tasks]
        both = list(zip(tasks, folders, strict=True))
        with laws.TWO_SETUPS.judging(self.plugin):
            found = ranks(self.world).run(runs.on_rank_two_setups, both, self.selecting())
        lines = []
        for index, task in enumerate(tasks):
            numbers = [one[index] for one in found]
            alone = self._run(ranks, scratch("alone"), [(self.selecting(), Stretch(start=0, stop=2))], task)
            lines += [
                f"rank {rank}, setup {index}: {own}, expected {list(alone[rank][0].numbers)}"
                for rank, own in enumerate(numbers)
                if own != list(alone[rank][0].numbers)
            ]
            # Of what lives on in the process, the run alone may be as wrong.
            if not declared(self.instance(), "replicas_differ"):
                expected = self._expected(ranks, task)
                pairs = list(zip(expected.losses, expected.norms, strict=True))[:2]
                lines += [
                    f"setup {index}, step {step}: {own}, expected {pair}"
                    for step, (own, pair) in enumerate(zip(numbers[0], pairs, strict=True))
                    if not close(own, pair, self._error)
                ]
        laws.TWO_SETUPS.hold(self.plugin, lines)

    def test_ranks_that_select_otherwise_all_raise(self, ranks: Ranks) -> None:
        """Where one rank lacks the plugin, all raise an error that names what differs."""
        own = self.selecting()
        other = {"strategy": "ddp" if self.plugin == default_strategy() else in_float32(default_strategy())}
        with laws.DISAGREES.judging(self.plugin):
            said = ranks(self.world).run(runs.on_rank_disagree, [own, other])
        lines = [f"rank {rank} raised {text!r}" for rank, text in enumerate(said) if "plugins" not in text]
        laws.DISAGREES.hold(self.plugin, lines)


def _plain_loss(task: Task) -> float:
    with torch.no_grad():
        return float(SPECIMENS[task.specimen].make(task.seed)(**task.batches(0)[0]).loss)
