"""The version of the contract between nemo_dist and plugins, and what has changed since version 1.

A plugin states in ``contract`` the version that it was written for; without it, that is version 1. An older plugin goes
on working: it need not know of hooks, arguments and attributes that came later. Only what was removed stops it, by
name. A plugin for a later version than this one is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

CONTRACT: Final = 1  # the version that this nemo_dist keeps

# Hooks that came after version 1, with their version: an older plugin may have a method of its own with that name.
ADDED: Mapping[str, int] = {}

# Hooks ("warp") and arguments of hooks ("shard.plan") that are gone, each with what to do instead.
REMOVED: Mapping[str, str] = {}
