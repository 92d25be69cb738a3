"""How Hypothesis runs here: no deadline, since a slow machine is no failure, and the same examples on every CI run."""

import os

import pytest
from hypothesis import settings

settings.register_profile("here", deadline=None)
settings.register_profile("ci", parent=settings.get_profile("here"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Leave Megatron-FSDP on ranks to the matrix: its stand-in for CUDA corrupts memory once in a hundred runs."""
    for item in items:
        if "megatron" in item.nodeid.lower() and {"ranks", "rank_pools"} & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)
