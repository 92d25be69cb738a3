"""Averaging passes the kit, waits for nobody, and resumes."""

from nemo_dist.testing import PluginConformance
from nemo_dist.testing.comm_recorder import assert_no_deadlock
from nemo_dist.testing.equivalence import Task
from nemo_dist.testing.resume import assert_resumes


class TestAveraging(PluginConformance):
    plugin = "averaging"


def test_no_rank_waits_for_ever_on_nccl(ranks):
    assert_no_deadlock(ranks(2), Task(), strategy="averaging")


def test_a_run_that_stops_twice_goes_on_as_if_it_had_not(ranks):
    assert_resumes(ranks(2), strategy="averaging")
