"""A loss of the user's own is, under every composition, what one process computes: numbers, gradients, steps."""

from cases import cases, slow
from loss_runs import LOSSES, LossTask, assert_as_one_process, setups

ALL = [
    (name, loss) if (name, loss) in {("fsdp2", "weighted"), ("cp", "of tokens")} else slow(name, loss)
    for name in setups()
    for loss in LOSSES
]


@cases(("name", "loss"), ALL)
def test_a_loss_of_ones_own_matches_one_process(ranks, name, loss):
    _, specimen, _ = setups()[name]
    assert_as_one_process(ranks, LossTask(specimen=specimen, loss=loss, length=13), name)


@cases(("name", "loss"), [("fsdp2", "weighted"), slow("cp", "of rows"), slow("pp", "weighted"), ("pp", "of tokens")])
def test_a_list_of_batches_with_a_loss_of_ones_own_matches_one_process(ranks, name, loss):
    assert_as_one_process(ranks, LossTask(loss=loss, accumulate=2), name)


def test_rows_that_fill_up_a_microbatch_do_not_count(ranks):
    assert_as_one_process(ranks, LossTask(loss="of rows", rows=7), "pp in pairs of rows")
