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
from nemo_dist.testing.localise import MOST, Culprit, bound
from nemo_dist.testing.proof_run import STEPS, Result, tensors_of

LEAST = 1e-5  # the least relative error of a loss or norm that counts
SMALL = 1e-5  # relative to the largest of its kind: the norm of a tensor that may be zero in exact arithmetic


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
    """A value in step ``step``, and how far that of ranks departs from it; ``name`` is that of a tensor, or empty.

    ``judged``: one process tells what is right, as its value is a number, and nearly the same when rounded unlike.
    """

    step: int
    what: str
    name: str
    held: Sequence[Held]
    error: float
    allowed: float
    judged: bool = True

    @property
    def wrong(self) -> bool:
        """Whether rounding does not explain the departure; it explains none from or to what is no number."""
        return not self.error <= self.allowed


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
        return next((one for found in self._by_step for one in found if one.wrong and one.judged), None)

    def checks(self) -> list[Check]:
        """Return one check for each kind of value."""
        texts = {
            "loss": "each step",
            "gradients": f"{len(self.single.gradients[0])} parameters, each step",
            "norm": "before clipping, each step",
            "parameters": f"and buffers, after each of {STEPS} AdamW steps",
        }
        checks = [
            *self._unjudged(),
            self._check("loaded", f"{len(self.single.loaded)} tensors, each bit", (-1,), "load"),
        ]
        checks += [self._check(what, text, range(STEPS)) for what, text in texts.items()]
        after = range(STEPS, len(self.single.losses))
        return [
            *checks,
            self._check("", "loss, gradients, norm and parameters of one more step", after, "save and load"),
        ]

    def _unjudged(self) -> list[Check]:
        """Return a check that fails where one process does not tell what is right."""
        found = [one for step in self._by_step for one in step if not one.judged]
        if not found:
            return []
        first, value = found[0], f"{found[0].what} {found[0].name}".strip()
        why = "another in float64" if first.allowed < float("inf") else "no number"
        text = f"it does not tell what is right, first {_position(first.step)}: {value} is {why}"
        return [Check(what="one process", ok=False, found=f"{text}; change what the model computes there")]

    def _check(self, what: str, text: str, steps: Sequence[int], title: str = "") -> Check:
        all_ = [one for found in self._by_step for one in found if one.step in steps and what in ("", one.what)]
        wrong = [one for one in all_ if one.wrong]
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
        failed = [error for error in dict.fromkeys(result.unexported for result in self.results) if error]
        if failed:
            return Check(what="export", ok=False, found=f"it was not written: {'; '.join(failed)}"), None
        try:
            found = tensors_of(load.from_pretrained(folder, dtype=torch.float32))
        except Exception as unread:  # whatever transformers raises for files that are no model, or another one
            return Check(what="export", ok=False, found=f"plain transformers does not read it: {told(unread)}"), None
        last = len(self.single.losses) - 1
        expected = self.single.parameters[last]
        wrong = [name for name in expected if name not in found]
        for name in expected.keys() & found.keys():
            error, allowed = self._error(found[name], expected[name], "parameters", last, name)
            wrong += [] if error <= allowed else [name]
        text = f"{len(expected)} tensors, read by plain transformers"
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
        wrong = [one.name for one in same if one.wrong]
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
            judged=allowed <= MOST,
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
            small = what != "loaded" and whole.double().norm().item() <= SMALL * self._largest[what, step]
            yield Departure(
                step=step,
                what=what,
                name=name,
                held=held,
                error=error,
                allowed=allowed,
                judged=allowed <= MOST or small,
            )

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
            (what, step): max(tensor.double().norm().item() for tensor in getattr(self.single, what)[step].values())
            for what in ("gradients", "parameters")
            for step in range(len(self.single.losses))
        }


def told(error: Exception) -> str:
    """Return the type of *error* and what it says, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _position(step: int) -> str:
    if step < 0:
        return "after loading"
    return "in the step after save and load" if step >= STEPS else f"in step {step + 1}"
