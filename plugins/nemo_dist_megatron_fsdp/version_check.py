"""Check the installed version of megatron-fsdp, without importing it or torch."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

DISTRIBUTION = "megatron-fsdp"
SERIES = "0.6"
INSTALL = "pip install 'nemo-dist[megatron-fsdp]'"


def problems() -> list[str]:
    """Say when the package is missing or of an untested version, and how to install it."""
    try:
        found = version(DISTRIBUTION)
    except PackageNotFoundError:
        return [f"strategy 'megatron_fsdp' needs the package {DISTRIBUTION} {SERIES}.*, not installed here; {INSTALL}"]
    if found.split(".")[:2] == SERIES.split("."):
        return []
    return [f"strategy 'megatron_fsdp' is tested with {DISTRIBUTION} {SERIES}.* (got {found}); {INSTALL}"]
