"""Public import path of the hook types; they are defined in ``nemo_dist.plugin.hookspecs``."""

from __future__ import annotations

from nemo_dist.plugin.hookspecs import Batch, Hooks, PluginState, RuntimePart, SavedState, hookimpl, hookspec

__all__ = ["Batch", "Hooks", "PluginState", "RuntimePart", "SavedState", "hookimpl", "hookspec"]
