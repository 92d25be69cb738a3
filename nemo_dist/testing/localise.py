"""Find the first module, and the axis, at which a run on ranks departs from the run of one process.

Outputs of modules are compared in the order of the forward, then the gradients of these outputs in the order of the
backward. How much rounding explains at each of them is taken from the run of one process in two precisions, as it grows
with the depth (TTrace, arXiv 2506.09280, bounds it alike).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import attrs
from torch import Tensor

from nemo_dist.planning.mesh_plan import MeshPlan, Role
from nemo_dist.testing.axes import Blame, Held, blame
from nemo_dist.testing.layouts import Match, Tokens, Verdict, match, relative
from nemo_dist.testing.trace import GRADIENT, INPUT, OUTPUT, RECOMPUTED, Site, Trace, is_complete

FLOOR = 2e-6  # relative: some 30 roundings of float32
FACTOR = 16.0  # times the difference of two roundings on one process: other orders of summation, with room to spare
MOST = 1e-2  # the most that rounding may explain; where it explains more, one process does not tell what is right


def bound(single: Tensor, other: Tensor) -> float:
    """Return the relative error that rounding explains, from two results of one process that were rounded unlike."""
    return FLOOR + FACTOR * relative(other, single)


@attrs.frozen(kw_only=True, eq=False)
class Part:
    """The trace of one part of the model on a rank, and the tokens that this rank computes on."""

    rank: int
    trace: Trace
    tokens: Tokens


@attrs.frozen(kw_only=True)
class Culprit:
    """Where ranks depart first: ``what`` of ``module``, along ``axis`` (None: the values do not tell), and why."""

    module: str
    what: str
    axis: str | None
    why: str

    def __str__(self) -> str:
        along = f"axis {self.axis}" if self.axis else "axis unknown"
        return f"{self.what} {self.module or 'the model'}, {along}: {self.why}"


@attrs.frozen(kw_only=True, eq=False, slots=False)
class Search:
    """Search the traces of all *parts* for the first departure from *single*; ``other`` is the same, rounded unlike."""

    single: Trace
    other: Trace
    parts: Sequence[Part]
    plan: MeshPlan

    def forward(self) -> Culprit | None:
        """Return the first output, or what was handed to a module, that is wrong; None if there is none."""
        return self._first(INPUT, OUTPUT)

    def backward(self) -> Culprit | None:
        """Return the first repeated output, or gradient of an output, that is wrong; None if there is none."""
        return self._first(RECOMPUTED) or self._first(GRADIENT)

    def _first(self, *whats: str) -> Culprit | None:
        for site in self._sites(*whats):
            if self._verdict(site) is Verdict.WRONG and self._matters(site):
                return self._culprit(site)
        return None

    def _sites(self, *whats: str) -> Iterator[Site]:
        """Yield the sites of *whats* in the order of the run on one process, which repeats nothing."""
        for site in self.single.values:
            if site.what in whats:
                yield site
            elif site.what == OUTPUT and RECOMPUTED in whats:
                yield attrs.evolve(site, what=RECOMPUTED)

    def _verdict(self, site: Site) -> Verdict:
        return self._judged(site)[0]

    @cached_property
    def _seen(self) -> frozenset[Site]:
        return frozenset(self.single.values)

    @cached_property
    def _memory(self) -> dict[Site, tuple[Verdict, list[Held], float]]:
        return {}

    def _judged(self, site: Site) -> tuple[Verdict, list[Held], float]:
        """Return the verdict on *site*, what the ranks hold there at the first call that is wrong, and the bound."""
        if site not in self._memory:
            self._memory[site] = self._judge(site)
        return self._memory[site]

    def _judge(self, site: Site) -> tuple[Verdict, list[Held], float]:
        recorded = attrs.evolve(site, what=OUTPUT) if site.what == RECOMPUTED else site
        count = len(self.single.values[recorded])
        verdicts = set()
        for call, whole in enumerate(self.single.calls(recorded, count)):
            allowed = bound(whole, self.other.calls(recorded, count)[call])
            scale = self.plan.splitting(Role.TOKENS) if site.what == GRADIENT else 1
            verdict, held = self._compare(site, call, count, whole * scale, allowed)
            if verdict is Verdict.WRONG:
                return verdict, held, allowed
            verdicts.add(verdict)
        return (verdicts.pop() if len(verdicts) == 1 else Verdict.OPEN), [], 0.0

    def _compare(self, site: Site, call: int, count: int, whole: Tensor, allowed: float) -> tuple[Verdict, list[Held]]:
        found: list[tuple[Part, Tensor, Match]] = []
        here = [part for part in self.parts if is_complete(site.module, part.trace.parameters, self.single.parameters)]
        for part in here:
            values = part.trace.calls(site, count)
            if values:
                peers = [other for other in here if other.tokens.own.equal(part.tokens.own)]
                place, local = peers.index(part), values[call]
                found.append((part, local, match(whole, local, part.tokens, allowed, len(peers), place)))
        verdicts = {result.verdict for _, _, result in found}
        held = [
            Held(rank=part.rank, value=local, expected=_shaped(result.expected, local), right=_right(result))
            for part, local, result in found
        ]
        if Verdict.WRONG in verdicts or _features_missing([result for _, _, result in found]):
            return Verdict.WRONG, held
        return (Verdict.RIGHT if verdicts == {Verdict.RIGHT} else Verdict.OPEN), held

    def _matters(self, site: Site) -> bool:
        """Whether what is wrong at *site* makes something else wrong; else it is only laid out in its own way.

        An argument does when the module's output is wrong too. Besides, no module around may have the right output or,
        for a gradient, right gradients of all that it reads.
        """
        if site.what == INPUT and not self._are(site.module, OUTPUT, Verdict.WRONG):
            return False
        for outer in _enclosing(site.module):
            if site.what == GRADIENT:
                made = [Site(GRADIENT, *key) for key, readers in self.single.readers.items() if outer in readers]
                read = [one for one in made if one in self.single.values]
                if read and all(self._verdict(one) is Verdict.RIGHT for one in read):
                    return False
            elif self._are(outer, OUTPUT if site.what == INPUT else site.what, Verdict.RIGHT):
                return False
        return True

    def _are(self, module: str, what: str, verdict: Verdict) -> bool:
        """Whether *module* has outputs, and all of them, or of a repeated forward, have this verdict."""
        sites = [site for site in self._sites(what) if site.module == module]
        return bool(sites) and all(self._verdict(site) is verdict for site in sites)

    def _culprit(self, site: Site) -> Culprit:
        _, held, allowed = self._judged(site)
        found = blame(held, self.plan, allowed)
        if site.what == INPUT:
            text = f"what it hands to {site.module} is wrong: {found.why}"
            around = next(name for name in _enclosing(site.module) if not name or Site(OUTPUT, name, 0) in self._seen)
            return Culprit(module=around, what="code of", axis=found.axis, why=text)
        if site.what != GRADIENT:
            return Culprit(module=site.module, what=f"{site.what} of", axis=found.axis, why=found.why)
        return self._backward_culprit(site, found)

    def _backward_culprit(self, site: Site, found: Blame) -> Culprit:
        """Name the modules that read an output: their backward made its gradient, from gradients that were right."""
        readers = self.single.readers.get((site.module, int(site.leaf)), [])
        inner = [name for name in readers if not any(other.startswith(f"{name}.") for other in readers)]
        if not inner:
            module = site.module.rpartition(".")[0]
            what = f"backward between the output of {site.module} and the end of"
        else:
            module, what = _common(inner), "backward of"
        made = f"the gradient of the output of {site.module} is wrong: {found.why}"
        return Culprit(module=module, what=what, axis=found.axis, why=made)


def _right(result: Match) -> bool:
    return result.verdict is not Verdict.WRONG


def _shaped(expected: Tensor | None, local: Tensor) -> Tensor | None:
    return expected.reshape(local.shape) if expected is not None and expected.numel() == local.numel() else None


def _features_missing(results: Sequence[Match]) -> bool:
    """Whether ranks hold some features each, and together not all."""
    some = [result.features for result in results if result.features is not None]
    return bool(some) and len(frozenset().union(*some)) < max(result.of for result in results)


def _enclosing(module: str) -> Iterator[str]:
    """Yield the names of the modules around *module*, innermost first, and last that of the model itself."""
    while module:
        module = module.rpartition(".")[0]
        yield module


def _common(names: Sequence[str]) -> str:
    """Return the one name, or that of the innermost module around all *names*."""
    if len(names) == 1:
        return names[0]
    around = [list(_enclosing(name)) for name in names]
    return next(name for name in around[0] if all(name in others for others in around))
