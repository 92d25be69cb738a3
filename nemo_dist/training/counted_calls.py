"""Find what a model of the user's own code does otherwise in a second forward on the same input, as one that counts.

Recomputation and pipelines run a block oftener than one process does, which must not show. A pipeline runs the forward
of the whole model for each microbatch; recomputation runs layers alone once more, after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from nemo_dist.hf_model import has_own_code
from nemo_dist.plugin.forwards import wrap_forward
from nemo_dist.torch_private import BatchNorm, tensors_in
from nemo_dist.training.fixed_draws import ELSEWHERE, elsewhere
from nemo_dist.training.kept_state import is_equal, kept_by
from nemo_dist.training.neighbouring_rows import unlike
from nemo_dist.training.rehearsal import Rehearsal, Run

_ROWS, _LENGTH = 2, 7
_FOUND = "_nemo_dist_second_forward"  # in the model's __dict__


@attrs.frozen(kw_only=True)
class SecondForward:
    """What is different in a second forward in training on one input: ``where`` is a buffer, a module, or None.

    ``drew``: own code draws by the generators of Python or numpy.
    """

    where: str | None = None
    drew: bool = False

    @classmethod
    def of(cls, model: Any) -> SecondForward:
        """Return that of *model*; told where it has the user's own code and can be run on tokens alone."""
        if not has_own_code(model):
            return cls()
        if _FOUND not in vars(model):
            try:
                vars(model)[_FOUND] = _run_twice(Rehearsal.of(model))
            except Exception:  # whatever a forward of any family raises
                vars(model)[_FOUND] = cls()
        found: SecondForward = vars(model)[_FOUND]
        return found

    @classmethod
    def of_layers(cls, model: Any, layers: Callable[[Any], Iterable[nn.Module]]) -> SecondForward:
        """Return that of the *layers* of a copy of *model* alone, each run once more after a forward of the model.

        What the model does around them is done once. Batch norms, which may yet be frozen, are left out.
        """
        if not has_own_code(model):
            return cls()
        try:
            rehearsal = Rehearsal.of(model)
            again = _Again(rehearsal=rehearsal, layers=set(layers(rehearsal.model)))
            with rehearsal.training():
                rehearsal.run({"input_ids": _tokens(rehearsal.model)})
            return again.found
        except Exception:  # whatever a forward of any family raises
            return cls()


def _run_twice(rehearsal: Rehearsal) -> SecondForward:
    model = rehearsal.model
    tokens = _tokens(model)
    with rehearsal.training():
        first, kept = rehearsal.run({"input_ids": tokens}), kept_by(model)
        second, later = rehearsal.run({"input_ids": tokens}), kept_by(model)
    where = _changed(kept, later)
    unknown = rehearsal.draws.unknown
    if where is None and unknown <= {ELSEWHERE}:  # both runs drew the same there
        where = next((rehearsal.culprit(name) for name in first.outputs if _differ(first, second, name)), None)
    return SecondForward(where=where, drew=ELSEWHERE in unknown)


@attrs.define(kw_only=True, eq=False)
class _Again:
    """Runs *layers* once more at the end of a forward, the last one first and as random as before, as a backward does.

    ``found``: what was different, once the forward has ended.
    """

    rehearsal: Rehearsal
    layers: set[nn.Module]
    found: SecondForward = attrs.field(factory=SecondForward, init=False)
    _calls: list[_LayerCall] = attrs.field(factory=list, init=False)

    def __attrs_post_init__(self) -> None:
        for name, module in self.rehearsal.model.named_modules():
            if module in self.layers:
                wrap_forward(module, partial(self._noted, name))
        self.rehearsal.model.register_forward_hook(lambda *_: self._run())

    def _noted(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        generator, others = torch.get_rng_state(), elsewhere()
        output = forward(*args, **kwargs)
        self._calls.append(
            _LayerCall(
                name=name,
                run=partial(forward, *args, **kwargs),
                generator=generator,
                outputs=[tensor.clone() for tensor in _tensors(output)],  # what follows may write into them
                drew=elsewhere() != others,
            )
        )
        return output

    def _run(self) -> None:
        if any(call.drew for call in self._calls):
            self.found = SecondForward(drew=True)
            return
        kept = self._kept()
        other = [call.name for call in reversed(self._calls) if call.is_other()]
        where = _changed(kept, self._kept()) or (self.rehearsal.culprit(other[-1]) if other else None)
        self.found = SecondForward(where=where)

    def _kept(self) -> dict[str, Any]:
        model = self.rehearsal.model
        norms = {name for name, module in model.named_modules() if isinstance(module, BatchNorm)}
        found = kept_by(model).items()
        return {name: value for name, value in found if name.rpartition(".")[0].removeprefix("buffer ") not in norms}


@attrs.frozen(kw_only=True, eq=False)
class _LayerCall:
    """One call of the layer *name*: how to *run* it again, what it gave, and the state of torch's *generator* before.

    ``drew``: it drew by a generator of Python or numpy.
    """

    name: str
    run: Callable[[], Any]
    generator: Tensor
    outputs: list[Tensor]
    drew: bool

    def is_other(self) -> bool:
        """Run it again, and tell whether it gives something else."""
        torch.set_rng_state(self.generator)
        return any(map(unlike, self.outputs, _tensors(self.run())))


def _tokens(model: Any) -> Tensor:
    words: int = model.config.get_text_config().vocab_size
    return torch.arange(_ROWS * _LENGTH).view(_ROWS, -1) % words


def _tensors(output: Any) -> list[Tensor]:
    return tensors_in(list(output.values()) if isinstance(output, dict) else output)


def _changed(kept: dict[str, Any], later: dict[str, Any]) -> str | None:
    """Return the first name of what modules keep *later* and did not, or not so, in *kept*."""
    return next((name for name in later if name not in kept or not is_equal(kept[name], later[name])), None)


def _differ(first: Run, second: Run, name: str) -> bool:
    """Whether the module *name* gave something else in the *second* run; attributes of modules tell the rest."""
    pairs = zip(first.outputs[name], second.outputs.get(name, []), strict=False)
    return any(unlike(one, other) for one, other in pairs)
