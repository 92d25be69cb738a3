"""The laws of the conformance kit on checkpoints and exports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from nemo_dist.plugin.protocol import declared
from nemo_dist.testing import laws
from nemo_dist.testing.conformance_runs import Stretch
from nemo_dist.testing.equivalence import (
    checkpoint,
    tensor_differences,
)
from nemo_dist.testing.kit import DIFFER, Kit, Ranks, close, settings_of
from nemo_dist.testing.precision import in_float32
from nemo_dist.testing.selecting import default_strategy
from nemo_dist.testing.temp_folders import scratch
from nemo_dist.testing.tensors import saved_weights


class CheckpointLaws(Kit):
    """The tests of what is saved, loaded and exported."""

    def test_it_resumes_twice_as_if_it_had_never_stopped(self, ranks: Ranks) -> None:
        """Save, load, train, save, load and train again: every number is that of a run without stops."""
        run = scratch("resumed")
        stretches = [
            Stretch(start=0, stop=2, save="first"),
            Stretch(start=0, stop=4),
            Stretch(start=2, stop=3, load="first", save="second"),
            Stretch(start=3, stop=4, load="second"),
        ]
        with laws.RESUMES.judging(self.plugin):
            found = self._run(ranks, run, [(self.selecting(), stretch) for stretch in stretches])
        lines = []
        for rank, (_, straight, once, twice) in enumerate(found):
            for number, steps in (("first", once.numbers), ("second", twice.numbers)):
                step = 2 if number == "first" else 3
                expected = straight.numbers[step : step + 1]
                lines += [
                    f"rank {rank}, step {step} after the {number} resume: loss and norm {steps}, expected {expected}"
                ] * (steps != expected)
            changed = [name for name, value in straight.after.items() if not torch.equal(value, twice.after[name])]
            if changed:
                lines.append(f"rank {rank}: {len(changed)} parameters differ in the end, such as {changed[0]}")
        laws.RESUMES.hold(self.plugin, lines)

    def test_its_checkpoints_go_to_and_from_another_strategy(self, ranks: Ranks) -> None:
        """Its checkpoint loads under the default strategy, and that one's under it: same weights, same numbers on."""
        if declared(self.instance(), "replicas_differ"):
            pytest.skip(DIFFER)
        run, own = scratch("crossed"), self.selecting()
        other = {"strategy": in_float32(default_strategy())}
        stretches = [
            (own, Stretch(start=0, stop=2, save="own", export="exported")),
            (other, Stretch(start=2, stop=4, load="own")),
            (other, Stretch(start=0, stop=2, save="other")),
            (own, Stretch(start=2, stop=4, load="other")),
            (own, Stretch(start=0, stop=4)),
        ]
        with laws.CROSSES.judging(self.plugin):
            found = [_joined(ranked) for ranked in zip(*self._run(ranks, run, stretches), strict=True)]
        saved, there, others, back, straight = found
        lines = _unequal("the weights that it saved, under the default strategy", there.before, saved.after)
        lines += _unequal("the weights of the default strategy, under it", back.before, others.after)
        error = self._error
        both = [("its own checkpoint", there), ("the checkpoint of the default strategy", back)]
        for name, one in [] if self.alone else both:  # the default strategy computes otherwise than such a plugin
            pairs = zip(one.numbers, straight.numbers[2:], strict=True)
            lines += [f"{name}: {a}, expected {b}" for a, b in pairs if not close(a, b, error)]
            lines += tensor_differences(f"{name}, parameters", one.after, straight.after, error)
        laws.CROSSES.hold(self.plugin, lines)
        with laws.EXPORTS.judging(self.plugin):
            lines = self._misread(Path(run) / "exported", saved.after)
        laws.EXPORTS.hold(self.plugin, lines)

    def _misread(self, folder: Path, weights: Mapping[str, Any]) -> list[str]:
        """Return how the export in *folder* is not what plain transformers writes of a model with these *weights*."""
        task, plain = self.task(), checkpoint(self.specimen)
        wanted, found = (saved_weights(one).keys() for one in (plain, folder))
        lines = [
            f"the export: {name} is {'missing' if name in wanted else 'too much'}" for name in sorted(wanted ^ found)
        ]
        model = task.load(folder)
        lines += _unequal("the export, in transformers", dict(model.named_parameters()), weights)
        settings, expected = (settings_of(one) for one in (model, task.load(plain)))
        changed = [name for name in {**settings, **expected} if settings.get(name) != expected.get(name)]
        return lines + [
            f"the exported configuration has {name} {settings.get(name)!r}, expected {expected.get(name)!r}"
            for name in changed
        ]


def _joined(ranked: Sequence[Any]) -> Any:
    """Return what all ranks gave of one stretch as one: the numbers of the first, the parameters of all."""
    before = {name: value for one in ranked for name, value in one.before.items()}
    after = {name: value for one in ranked for name, value in one.after.items()}
    return attrs.evolve(ranked[0], before=before, after=after)


def _unequal(what: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Return a line for each tensor of *expected* that *found* lacks or has otherwise."""
    lines = [f"{what}: {name} is missing" for name in expected if name not in found]
    lines += [f"{what}: {name} is not in the model" for name in found if name not in expected]
    both = [name for name in expected if name in found]
    return lines + [f"{what}: {name} differs" for name in both if not torch.equal(found[name], expected[name])]
