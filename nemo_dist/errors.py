"""The exception classes of nemo_dist."""

from __future__ import annotations

from collections.abc import Iterable

_LISTED = 30  # problems in the text of an error; all are in ``problems``


class NemoDistError(Exception):
    """Base of the errors raised by nemo_dist."""


class PluginError(NemoDistError):
    """A plugin is missing, broken, or does not keep the hook contract."""


class TopologyError(NemoDistError, ValueError):
    """The requested sizes, options and plugins do not fit together; ``problems`` lists every reason as one sentence."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems: tuple[str, ...] = tuple(dict.fromkeys(problems))
        more = len(self.problems) - _LISTED
        lines = [*self.problems[:_LISTED], *([f"and {more} more"] if more > 0 else [])]
        super().__init__("\n".join(f"- {line}" for line in lines))


class RankError(NemoDistError, RuntimeError):
    """Ranks disagree, or a rank failed or did not arrive; the message names the ranks."""


class CheckpointError(NemoDistError, RuntimeError):
    """A checkpoint is missing, incomplete, damaged, or does not belong to the model."""


class UnknownNameError(PluginError, ValueError):
    """No installed plugin, option or key has this name; the message gives the nearest match and the valid names."""
