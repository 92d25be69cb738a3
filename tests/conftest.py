"""How Hypothesis runs here, and which cases of a test on ranks the default run takes.

No deadline, and no check of how long drawing takes, since a slow machine is no failure; the same examples on every CI
run.
"""

import os
from zlib import crc32

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("here", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("here"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")

_ON_RANKS = {"ranks", "rank_pools", "on_ranks"}
# Of the laws of the conformance kit that need ranks, the one that the default run holds our own plugins to.
_LAW = "test_it_computes_what_one_process_computes"


def pytest_addoption(parser):
    parser.addoption("--one-in", type=int, default=1, metavar="N", help="run one of N tests, always the same ones")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Of each test on ranks take the first case; `make matrix` takes the others.

    Of the conformance kit on our own plugins it takes one law. A case that is named on the command line runs. Those
    that are marked `slow` do not count.
    """
    asked = [argument for argument in config.args if "[" in argument]
    cases = {}
    for item in items:
        if _ON_RANKS & set(item.fixturenames) and not item.get_closest_marker("slow"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for item in items:
        of_kit = hasattr(item.cls, "selecting") and "ranks" in item.fixturenames
        if of_kit and item.name != _LAW and item.nodeid not in config.args:
            item.add_marker("slow")
    for found in cases.values():
        for item in found[1:]:
            if not any(argument.endswith(item.nodeid.rpartition("/")[2]) for argument in asked):
                item.add_marker("slow")
    kept, dropped = [], []
    for item in items:
        (dropped if crc32(item.nodeid.encode()) % config.option.one_in else kept).append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept
