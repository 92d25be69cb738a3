"""The hooks under their public path; ``nemo_dist.plugin.hookspecs`` specifies them."""

from __future__ import annotations

from nemo_dist.plugin.hookspecs import Batch, Hooks, PluginState, RuntimePart, SavedState, hookimpl, hookspec

__all__ = ["Batch", "Hooks", "PluginState", "RuntimePart", "SavedState", "hookimpl", "hookspec"]
