"""Compare what ranks computed with what one process computed: losses, gradients, norms, parameters, the export."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from nemo_dist.planning.mesh_plan import MeshPlan
from nemo_dist.testing.axes import Held, blame
from nemo_dist.testing.layouts import relative
from nemo_dist.testing.localise import Culprit, bound
from nemo_dist.testing.proof_run import STEPS, Result

LEAST = 1e-5  # the least relative error of a loss or norm that counts


@attrs.frozen(kw_only=True)
class Check:
    """One line of a report: ``what`` was compared, whether it is ``ok``, and in words what was ``found``."""

    what: str
    ok: bool
    found: str

    def __str__(self) -> str:
        return f"{'equal' if self.ok else 'WRONG':<6} {self.what}: {self.found}"


@attrs.frozen(kw_only=True, eq=False)
class Departure:
    """A value in step ``step`` that is not the one of one process; ``name`` is that of a parameter, or empty."""

    step: int
    what: str
    name: str
    held: Sequence[Held]
    error: float
    allowed: float


@attrs.frozen(kw_only=True, eq=False, slots=False)
class Comparison:
    """Compare the *results* of all ranks of *plan* with ``single``; ``other`` is the same run, rounded unlike it."""

    single: Result
    other: Result
    results: Sequence[Result]
    plan: MeshPlan

    @property
    def first(self) -> Departure | None:
        """Return the first departure in the order of a run."""
        return next((found for what in self._by_step for found in what if found.error > found.allowed), None)

    def checks(self) -> list[Check]:
        """Return one check for each kind of value."""
        texts = {
            "loss": "each step",
            "gradients": f"{len(self.single.gradients[0])} parameters, each step",
            "norm": "before clipping, each step",
            "parameters": f"after each of {STEPS} AdamW steps",
        }
        checks = [self._check("loaded", f"{len(self.single.loaded)} parameters, each bit", (-1,), "load")]
        checks += [self._check(what, text, range(STEPS)) for what, text in texts.items()]
        after = range(STEPS, len(self.single.losses))
        return [
            *checks,
            self._check("", "loss, gradients, norm and parameters of one more step", after, "save and load"),
        ]

    def _check(self, what: str, text: str, steps: Sequence[int], title: str = "") -> Check:
        all_ = [one for found in self._by_step for one in found if one.step in steps and what in ("", one.what)]
        wrong = [one for one in all_ if one.error > one.allowed]
        worst = max(wrong or all_, key=lambda one: one.error / (one.allowed or 1e-30))
        at = f" of {worst.name}" if worst.name else ""
        found = text
        if worst.error:
            found += f"; largest relative error {worst.error:.1e}{at}, where rounding explains {worst.allowed:.1e}"
        if wrong:
            found = f"{len(wrong)} of {len(all_)} differ, first {_position(wrong[0].step)}; {found}"
        return Check(what=title or what, ok=not wrong, found=found)

    def exported(self, folder: Path, load: Any) -> tuple[Check, Culprit | None]:
        """Check that plain transformers loads the export in *folder* with *load* as the parameters of one process."""
        found = {name: p.detach() for name, p in load.from_pretrained(folder, dtype=torch.float32).named_parameters()}
        last = len(self.single.losses) - 1
        expected = self.single.parameters[last]
        wrong = [name for name in expected if name not in found]
        for name in expected.keys() & found.keys():
            error, allowed = self._error(found[name], expected[name], "parameters", last, name)
            wrong += [name] if error > allowed else []
        text = f"{len(expected)} parameters, read by plain transformers"
        if not wrong:
            return Check(what="export", ok=True, found=text), None
        first = min(wrong, key=list(expected).index)
        text = f"{len(wrong)} of {text}, are missing or wrong, first {first}"
        module = first.rpartition(".")[0]
        return Check(what="export", ok=False, found=text), Culprit(
            module=module, what="export, parameter of", axis=None, why="every rank writes its own files"
        )

    def culprit(self) -> Culprit | None:
        """Return where the first departure is, as far as losses, gradients, norms and parameters tell."""
        found = self.first
        if found is None:
            return None
        axis = blame(found.held, self.plan, found.allowed)
        same = [one for step in self._by_step for one in step if (one.step, one.what) == (found.step, found.what)]
        wrong = [one.name for one in same if one.error > one.allowed]
        kinds = {"gradients": "gradient of a parameter of", "parameters": "parameter of", "loaded": "parameter of"}
        what = f"{_position(found.step)}, {kinds.get(found.what, found.what + ' of')}"
        if len(wrong) == len(same):
            where, names = "", "" if len(same) == 1 else "every parameter: "
        else:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            where, names = found.name.rpartition(".")[0], f"{found.name}{more}: "
        return Culprit(module=where, what=what, axis=axis.axis, why=f"{names}{axis.why}")

    @cached_property
    def _by_step(self) -> list[list[Departure]]:
        """Everything that is compared, in the order of the run; right or not."""
        return [
            list(self._tensors(-1, "loaded")),
            *(
                list(found)
                for step in range(len(self.single.losses))
                for found in (
                    self._numbers(step, "loss", "losses"),
                    self._tensors(step, "gradients"),
                    self._numbers(step, "norm", "norms"),
                    self._tensors(step, "parameters"),
                )
            ),
        ]

    def _numbers(self, step: int, what: str, field: str) -> Iterator[Departure]:
        expected = torch.tensor(getattr(self.single, field)[step], dtype=torch.float64)
        other = torch.tensor(getattr(self.other, field)[step], dtype=torch.float64)
        allowed = max(LEAST, bound(expected, other))
        values = [torch.tensor(getattr(result, field)[step], dtype=torch.float64) for result in self.results]
        errors = [relative(value, expected) for value in values]
        yield Departure(
            step=step,
            what=what,
            name="",
            held=[
                Held(rank=rank, value=value, expected=expected, right=error <= allowed)
                for rank, (value, error) in enumerate(zip(values, errors, strict=True))
            ],
            error=max(errors),
            allowed=allowed,
        )

    def _tensors(self, step: int, what: str) -> Iterator[Departure]:
        expected: Mapping[str, Tensor] = self._of(self.single, what, step)
        for name, whole in reversed(list(expected.items())) if what == "gradients" else expected.items():
            held, errors, allowed = [], [], 0.0
            for rank, result in enumerate(self.results):
                value = self._of(result, what, step).get(name)
                if value is not None:
                    error, allowed = self._error(value, whole, what, step, name)
                    errors.append(error)
                    held.append(Held(rank=rank, value=value, expected=whole, right=error <= allowed))
            error = max(errors, default=float("inf"))  # no rank has it
            yield Departure(step=step, what=what, name=name, held=held, error=error, allowed=allowed)

    @staticmethod
    def _of(result: Result, what: str, step: int) -> Mapping[str, Tensor]:
        found: Mapping[str, Tensor] = result.loaded if what == "loaded" else getattr(result, what)[step]
        return found

    def _error(self, value: Tensor, whole: Tensor, what: str, step: int, name: str) -> tuple[float, float]:
        """Return the relative error of *value*, and the one that rounding explains."""
        if value.shape != whole.shape:
            return float("inf"), 0.0
        if what == "loaded":
            return relative(value, whole), 0.0
        other = getattr(self.other, what)[step][name]
        # Rounding of the largest tensor of its kind reaches all of them, also those that are zero in exact arithmetic.
        least = self._largest[what, step] * 1e-8 / whole.double().norm().clamp(min=1e-30).item()
        return relative(value, whole), bound(whole, other) + least

    @cached_property
    def _largest(self) -> dict[tuple[str, int], float]:
        return {
            (what, step): max(tensor.norm().item() for tensor in getattr(self.single, what)[step].values())
            for what in ("gradients", "parameters")
            for step in range(len(self.single.losses))
        }


def _position(step: int) -> str:
    if step < 0:
        return "after loading"
    return "in the step after save and load" if step >= STEPS else f"in step {step + 1}"
