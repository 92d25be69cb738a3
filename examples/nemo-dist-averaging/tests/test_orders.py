"""Averaging trains alike in any order of calls."""

from hypothesis import given, settings

from nemo_dist.testing import strategies
from nemo_dist.testing.call_orders import assert_order_changes_nothing


@settings(max_examples=5, deadline=None)
@given(order=strategies.call_orders())
def test_the_order_of_calls_changes_nothing(ranks, order):
    assert_order_changes_nothing(ranks(2), order, strategy="averaging")
