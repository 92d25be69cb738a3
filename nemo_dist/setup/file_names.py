"""Words for messages on files that are not there."""

from __future__ import annotations

import os
from pathlib import Path

from nemo_dist.planning.validation import near


def near_file(path: str | os.PathLike[str]) -> str:
    """Return ``near`` of the name of *path* among what is in its folder, or an empty string where it exists."""
    try:
        found = Path(path)
        return near(found.name, sorted(entry.name for entry in found.parent.iterdir())) if not found.exists() else ""
    except (OSError, ValueError):  # there is no such folder, or no such path
        return ""
