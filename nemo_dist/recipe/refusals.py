"""Refuse what a run would fail at later, or do otherwise than asked: its rows, its schedule, and steps done before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs

from nemo_dist.checkpoint.run_folder import RunFolder
from nemo_dist.errors import TopologyError
from nemo_dist.planning.mesh_plan import Role
from nemo_dist.recipe.config import ModelSection, Recipe
from nemo_dist.recipe.model import config_of, positions_of, weightless
from nemo_dist.recipe.progress import say
from nemo_dist.recipe.row_stream import MULTIPLE
from nemo_dist.recipe.tokens import Row
from nemo_dist.setup.explain import facts_of
from nemo_dist.setup.setup import DistributedSetup


def judge_schedule(recipe: Recipe, setup: DistributedSetup) -> None:
    """Raise TopologyError where a rank has too few rows in a step for the schedule of its pipeline."""
    if setup.plan.splitting(Role.LAYERS) == 1:
        return
    rows, batches = recipe.rows_of_batch(setup), recipe.training.accumulation
    model = weightless(recipe.model)
    try:
        facts: Any = facts_of(setup, model, rows * batches, recipe.data.length)
    except AttributeError:  # of a config without heads: then the first step says it
        return
    step = setup.calls.only("schedule", plan=setup.plan, facts=attrs.evolve(facts, batches=batches), model=None)
    if step is not None and step.problem:
        raise TopologyError(
            [
                f"{step.problem}: training.batch_size {recipe.training.batch_size} gives a rank {rows} rows in each of "
                f"{batches} batches, and a microbatch is of {step.rows}; raise training.batch_size, or change "
                "training.accumulation"
            ]
        )


def judge_rows(model: ModelSection, rows: Sequence[Row]) -> int | None:
    """Return how many positions *model* has, None where it takes all that *rows* and their padding have.

    Raises ValueError for tokens and positions that it does not have.
    """
    _refuse_unknown_tokens(rows, config_of(model).get_text_config().vocab_size)
    longest = max(length for row in rows for length in row.lengths)
    positions = positions_of(model, longest + MULTIPLE)
    if positions is not None and longest > positions:
        raise ValueError(
            f"a row has {longest} tokens, but the model has {positions} positions; set data.length to "
            f"at most {positions}"
        )
    return positions


def _refuse_unknown_tokens(rows: Sequence[Row], size: int) -> None:
    largest = max(int(row.tokens.max()) for row in rows)
    if largest >= size:
        raise ValueError(
            f"the tokenizer makes the token {largest}, but the model knows {size}; give model.tokenizer one that fits, "
            "or a new model a larger vocab_size"
        )


def refuse_other_steps(recipe: Recipe, done: int, taken: int) -> None:
    """Raise TopologyError where steps of another size have come before: epochs do not say how many are then left."""
    training = recipe.training
    if training.epochs is not None and taken != done * training.batch_size:
        raise TopologyError(
            [
                f"training.batch_size is {training.batch_size}, but the run read {taken} rows in its {done} steps, so "
                "training.epochs does not say how many are left; keep training.batch_size, or set training.steps in "
                "place of training.epochs"
            ]
        )


def say_what_stays(folder: RunFolder) -> None:
    """Say which checkpoints a run that begins anew finds in *folder*; RunFolder never removes those of later steps."""
    steps = folder.steps()
    if steps:
        say(
            f"begins anew, as checkpoint.resume says; {folder.path} has checkpoints of a run before, of steps "
            f"{', '.join(map(str, steps[:5]))}{', ...' * (len(steps) > 5)}, and those of later steps than this run's "
            "stay; name a new checkpoint.folder to have them apart"
        )


def refuse_too_few_steps(recipe: Recipe, done: int, steps: int) -> None:
    """Raise TopologyError where more steps are done than the run has: its export would be of the later one."""
    if done > steps:
        asked = "steps" if recipe.training.steps is not None else "epochs"
        raise TopologyError(
            [
                f"training.{asked} makes {steps} steps, but the run in {recipe.checkpoint.folder} has done {done}; "
                f"make it {done} steps or more, or set checkpoint.folder to a new folder"
            ]
        )
