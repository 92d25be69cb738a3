"""Read the names of a checkpoint for one part of a model as the whole model reads them.

transformers decides by the names that a model has: a name that a renaming would lead nowhere is taken as it stands, and
a tied weight that is stored under its other name only is taken from there. Of a model that is split over ranks each
part has some of the names, so both go wrong on it without a word: a renamed layer is loaded from the weights of
another one, and the embedding of the first stage is drawn anew, although the file has it as that of the head.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key


@attrs.frozen
class WholeModel:
    """The ``names`` of parameters and buffers of a whole model, and its ``ties``, from a name to that of its source."""

    names: Mapping[str, Any]
    ties: Mapping[str, str]

    @classmethod
    def of(cls, model: Any) -> WholeModel:
        """Return what is needed of *model*, before it is split."""
        return cls(dict.fromkeys(model.state_dict(), True), dict(getattr(model, "all_tied_weights_keys", None) or {}))

    def state_for(self, part: Any, state: Mapping[str, Any], mapping: Sequence[Any]) -> Mapping[str, Any]:
        """Return what of the checkpoint *state* the *part* takes by the transforms *mapping*.

        That is *state* without what is of another part, where transformers would take it for a weight of this one; and
        a tied weight whose source is here also under the name of the source, where it has only its other name.
        """
        here = part.state_dict().keys()
        if here >= self.names.keys():
            return state
        reading = _Reading(mapping, part.base_model_prefix, self.names)
        others = [name for name in state if name in here and reading.target(name) not in here]
        for name in others:
            reading.note(name)
        kept = {name: source for name, source in state.items() if name not in others} if others else state
        away = [(target, source) for target, source in self.ties.items() if source in here and target not in here]
        if not away or all(source in state for _, source in away):
            return kept
        stored = {reading.target(name): name for name in sorted(state, key=dot_natural_key)}
        found = {
            source: state[stored[target]]
            for target, source in reversed(away)  # of several the first, as transformers takes it
            if source not in stored and target in stored
        }
        return {**kept, **found}


class _Reading:
    """How a whole model reads the names of a checkpoint."""

    def __init__(self, mapping: Sequence[Any], base: str | None, names: Mapping[str, Any]) -> None:
        self._mapping, self._base, self._names = mapping, base, names
        self._mine = list(_by_kind(copy.deepcopy(list(mapping))))  # a transform keeps notes of what it matched

    def target(self, name: str) -> str:
        """Return the name in the model of the tensor *name* of the checkpoint, as transformers' loader does."""
        given: Any = self._names
        renamed, _ = rename_source_key(name, self._mine[0], self._mine[1], self._base, given)
        if renamed not in self._names and name in self._names:
            renamed, _ = rename_source_key(name, [], [], self._base, given)
        return renamed

    def note(self, name: str) -> None:
        """Let the transforms note that they matched *name*: an export undoes those that matched."""
        renamings, converters = _by_kind(self._mapping)
        rename_source_key(name, renamings, converters)


def _by_kind(mapping: Sequence[Any]) -> Iterator[list[Any]]:
    for kind in (WeightRenaming, WeightConverter):
        yield [entry for entry in mapping if isinstance(entry, kind)]
