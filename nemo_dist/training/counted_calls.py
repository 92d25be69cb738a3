"""Find what a model of the user's own code does otherwise in a second forward on the same input, as one that counts.

Recomputation and pipelines run a block oftener than one process does, which must not show.
"""

from __future__ import annotations

from typing import Any

import attrs
import torch

from nemo_dist.hf_model import has_own_code
from nemo_dist.training.fixed_draws import ELSEWHERE
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


def _run_twice(rehearsal: Rehearsal) -> SecondForward:
    model = rehearsal.model
    tokens = torch.arange(_ROWS * _LENGTH).view(_ROWS, -1) % model.config.get_text_config().vocab_size
    with rehearsal.training():
        first, kept = rehearsal.run({"input_ids": tokens}), kept_by(model)
        second, later = rehearsal.run({"input_ids": tokens}), kept_by(model)
    where = next((name for name in later if name not in kept or not is_equal(kept[name], later[name])), None)
    unknown = rehearsal.draws.unknown
    if where is None and unknown <= {ELSEWHERE}:  # both runs drew the same there
        where = next((rehearsal.culprit(name) for name in first.outputs if _differ(first, second, name)), None)
    return SecondForward(where=where, drew=ELSEWHERE in unknown)


def _differ(first: Run, second: Run, name: str) -> bool:
    """Whether the module *name* gave something else in the *second* run; attributes of modules tell the rest."""
    pairs = zip(first.outputs[name], second.outputs.get(name, []), strict=False)
    return any(unlike(one, other) for one, other in pairs)
