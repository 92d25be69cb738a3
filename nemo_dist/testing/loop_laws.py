"""The laws of the conformance kit on what is the user's: the loop, batches, modes, groups of options, evaluation."""

from __future__ import annotations

import pytest
import torch

from nemo_dist.plugin.protocol import declared
from nemo_dist.testing import conformance_evaluation as evaluation
from nemo_dist.testing import conformance_runs as runs
from nemo_dist.testing import conformance_user as user
from nemo_dist.testing import laws
from nemo_dist.testing.equivalence import (
    checkpoint,
    tensor_differences,
)
from nemo_dist.testing.kit import DIFFER, Kit, Ranks

_NO_LOOP = "a plugin runs the batches by an engine, so the user has no loop of the model"


class LoopLaws(Kit):
    """The tests of calls in the orders that users choose."""

    def test_it_sums_gradients_in_the_loop_of_the_user(self, ranks: Ranks) -> None:
        """Backwards within ``no_sync`` and one after it give the sum of the gradients of all, averaged once."""
        if declared(self.instance(), "replicas_differ"):
            pytest.skip(DIFFER)
        task = self.task()
        with laws.OWN_LOOP.judging(self.plugin):
            found = ranks(self.world).run(runs.on_rank_own_loop, task, checkpoint(task.specimen), self.selecting())
        loops = [one for one in found if one is not None]
        if not loops:
            pytest.skip(_NO_LOOP)
        lines = [line for one in loops for line in tensor_differences("gradients", one[0], one[1], self._error)]
        first = {name: gradient for together, _ in reversed(loops) for name, gradient in together.items()}
        lines += [
            f"the gradient of {name} differs between ranks"
            for together, _ in loops
            for name, gradient in together.items()
            if not torch.equal(gradient, first[name])
        ]
        laws.OWN_LOOP.hold(self.plugin, list(dict.fromkeys(lines)))

    def test_it_steps_no_gradients_that_wait(self, ranks: Ranks) -> None:
        """``zero_grad`` drops what waits after ``no_sync``; a step of it is refused, or what one process does."""
        if declared(self.instance(), "replicas_differ"):
            pytest.skip(DIFFER)
        task = self.task()
        with laws.WAITS.judging(self.plugin):
            found = ranks(self.world).run(user.on_rank_waiting, task, checkpoint(task.specimen), self.selecting())
        if None in found:
            pytest.skip(_NO_LOOP)
        pairs = [(what, *both) for one in found for what, both in one.items()]
        lines = [
            line for what, made, expected in pairs for line in tensor_differences(what, made, expected, self._error)
        ]
        laws.WAITS.hold(self.plugin, list(dict.fromkeys(lines)))

    def test_a_second_runtime_computes_the_same_again(self, ranks: Ranks) -> None:
        """Two runtimes of one model give equal numbers; an evaluation between them changes none."""
        self._hold_on_ranks(laws.AGAIN, ranks, user.on_rank_again)

    def test_it_leaves_what_is_the_users_alone(self, ranks: Ranks) -> None:
        """Loading, a step and an evaluation change no batch, no random generator and no mode, in either mode."""
        self._hold_on_ranks(laws.UNTOUCHED, ranks, user.on_rank_untouched)

    def test_it_steps_each_group_by_its_options(self, ranks: Ranks) -> None:
        """Groups keep their options, betas and momentum included, and a change of the learning rate is followed."""
        if declared(self.instance(), "replicas_differ"):
            pytest.skip(DIFFER)
        task = self.task()
        weights = checkpoint(task.specimen)
        with laws.STEPS.judging(self.plugin):
            ranked = ranks(self.world).run(user.on_rank_groups, task, weights, self.selecting())
        expected = self._by_one_process(ranks, user.on_rank_groups, user.plain_groups)
        lines, refused = [], []
        for name in user.OPTIMIZERS:
            said = [one[name] for one in ranked]
            if all(isinstance(one, str) for one in said):
                refused.append(f"{name}: {said[0]}")
                continue
            found = {key: value for one in said if not isinstance(one, str) for key, value in one.items()}
            lines += tensor_differences(f"parameters under {name}", found, expected[name], self._error)
        laws.STEPS.hold(self.plugin, refused if len(refused) == len(user.OPTIMIZERS) else lines)
        if refused:
            pytest.skip(f"it refuses {'; '.join(refused)}; what it takes steps as it should")

    def test_it_evaluates_as_one_process_does(self, ranks: Ranks) -> None:
        """``evaluate`` of uneven batches and ``forward`` give the loss and logits of one process, trained or not."""
        if declared(self.instance(), "replicas_differ"):
            pytest.skip(DIFFER)
        task = self.task()
        weights = checkpoint(task.specimen)
        with laws.EVALUATES.judging(self.plugin):
            found = ranks(self.world).run(evaluation.on_rank_evaluated, task, weights, self.selecting())
        expected = self._by_one_process(ranks, evaluation.on_rank_evaluated, evaluation.plain_evaluated)
        laws.EVALUATES.hold(self.plugin, evaluation.wrong(found, expected, self._error))
