"""Tools for testing plugins: conformance kit, Hypothesis strategies, a pool of ranks; each is loaded on first use.

Here: ``conformance`` (the kit), its ``laws`` and the tests of them (``planning_laws``, ``training_laws``,
``loop_laws``, ``checkpoint_laws``; ``kit`` is what these share), ``conformance_cases`` (setups), ``kit_adapters``
(PEFT's, in them), ``conformance_runs``, ``conformance_user`` and ``conformance_evaluation`` (what runs on ranks),
``diagnosis`` (where to look); ``equivalence`` (training compared with one process), ``call_orders`` and ``call_names``
(the same for any order of calls), ``resume`` (for runs that stop), ``comm_recorder`` and ``comm_playback`` (whether
ranks would wait for ever on NCCL), ``strategies``, ``selecting`` (a setup for a plugin), ``tiny_models``; a proof for a
user's own model: ``proof``, which uses ``local_topology``, ``tiny_work``, ``proof_run``, ``comparison``, and to find
where it departs ``trace``, ``layouts``, ``axes``, ``localise``; the ranks: ``pool``, ``worker``, ``remote_call``,
``failure_report``, ``plugin`` (pytest fixtures); every family of transformers: ``shrink`` (a config made tiny),
``families`` (the sweep and its command), ``family_cells``, ``family_names``, ``family_page``; and small tools:
``precision``, ``tensors``, ``temp_folders``, ``io_counter``, ``fake_cuda``, ``live_objects`` (what a process still
holds). Not here: tests.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_dist.testing import strategies as strategies
    from nemo_dist.testing.conformance import PluginConformance as PluginConformance
    from nemo_dist.testing.pool import RankPool as RankPool
    from nemo_dist.testing.proof import Report as Report
    from nemo_dist.testing.proof import verify as verify

# The public names and the module of each; "strategies" is the module itself. pytest, hypothesis and torch take seconds
# to import, and a test that needs one of these names does not need all three.
_HOMES = {
    "PluginConformance": "nemo_dist.testing.conformance",
    "RankPool": "nemo_dist.testing.pool",
    "Report": "nemo_dist.testing.proof",
    "strategies": "nemo_dist.testing.strategies",
    "verify": "nemo_dist.testing.proof",
}

__all__ = ["PluginConformance", "RankPool", "Report", "strategies", "verify"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_HOMES[name])
    return module if module.__name__ == f"{__name__}.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return __all__
