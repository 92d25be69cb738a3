"""The axis passes the kit at size 2, with sharded and replicated parameters, and says what it cannot share."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_dist import FSDP2Config, ParallelismSizes
from nemo_dist.testing import PluginConformance, strategies
from nemo_dist.testing.equivalence import Task, assert_equivalent
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.resume import assert_resumes
from nemo_dist.testing.tensors import of_batch
from nemo_dist_rows import Rows, share

TWO = {"parallelism_sizes": ParallelismSizes(extra={"rows": 2}), "plugins": ("rows",)}


class TestRows(PluginConformance):
    plugin = "rows"
    build = {"strategy": FSDP2Config(mp_policy=FP32), **TWO}


def test_a_run_that_stops_twice_goes_on_as_if_it_had_not(ranks):
    assert_resumes(ranks(2), strategy=FSDP2Config(mp_policy=FP32), **TWO)


def test_it_trains_with_replicas_and_rows_that_do_not_divide(ranks):
    assert_equivalent(ranks(2), Task(rows=5), strategy="ddp", **TWO)


@given(plan=strategies.plans(max_world=64, plugins=(Rows(),)))
def test_ranks_along_rows_read_one_batch(plan):
    for group in plan.groups("rows") if "rows" in plan.dense else ():
        assert {plan.dp_rank(rank) for rank in group} == {plan.dp_rank(group[0])}


@given(rows=st.integers(1, 9), size=st.integers(1, 9))
def test_every_row_is_computed_once(rows, size):
    batch = {"input_ids": torch.arange(rows)[:, None]}
    if rows < size:
        with pytest.raises(ValueError, match=f"a batch of {rows} rows cannot be shared by {size} ranks"):
            share(batch, size, 0)
    else:
        parts = [share(batch, size, rank)["input_ids"] for rank in range(size)]
        assert torch.equal(torch.cat(parts), batch["input_ids"])


def test_what_has_no_rows_is_refused_by_name():
    batch = {"input_ids": torch.zeros(4, 3), "position_ids": torch.zeros(3, 4, 3)}
    with pytest.raises(ValueError, match="position_ids has shape"):
        share(batch, 2, 0)


@given(batch=strategies.batches(rows=st.integers(2, 5)))
def test_two_ranks_compute_all_rows_of_any_batch(batch):
    whole = of_batch(batch)
    first, second = (share(whole, 2, rank) for rank in range(2))
    assert all(torch.equal(torch.cat([first[name], second[name]]), whole[name]) for name in whole)


ROWS = {"plugins": ("rows",), "axes": ("dp_shard", "rows")}


@settings(max_examples=3, deadline=None)
@given(selected=strategies.selections(max_world=2, strategies=("fsdp2", "ddp"), **ROWS))
def test_it_trains_like_one_process_wherever_it_is_accepted(ranks, selected):
    world = selected.pop("world_size")
    assert_equivalent(ranks(world), Task(), **selected)
