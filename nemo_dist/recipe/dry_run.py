"""Say what a recipe will do, without a rank: the plan of its setup, its data, its steps, and what is saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nemo_dist.hf_model import IGNORED, without_adapters
from nemo_dist.recipe.config import DataSection, Recipe
from nemo_dist.recipe.job import judge, steps_of
from nemo_dist.recipe.model import adapter_config, weightless
from nemo_dist.recipe.refusals import judge_rows, judge_schedule
from nemo_dist.recipe.tokens import rows_of, tokenizer_of
from nemo_dist.setup.setup import DistributedSetup
from nemo_dist.training.peft_adapters import adapted_on_meta


def described(recipe: Recipe, setup: DistributedSetup) -> str:
    """Return what *recipe* does under *setup* as text; raise what the run would raise before it loads the model."""
    judge(recipe)
    judge_schedule(recipe, setup)
    model = weightless(recipe.model)
    tokenizer = tokenizer_of(recipe.model, recipe.data)
    adapters = adapter_config(recipe.model)
    trained = model if adapters is None else adapted_on_meta(model, adapters)
    plan = setup.explain(trained, recipe.rows_of_batch(setup), recipe.data.length)
    with without_adapters(trained) as (plain, added):
        return "\n".join([plan, "", *_lines(recipe, setup, plain, added, tokenizer)])


def _lines(
    recipe: Recipe, setup: DistributedSetup, model: Any, added: Mapping[str, Any], tokenizer: Any
) -> Iterator[str]:
    weights = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(one.numel() for one in (*model.parameters(), *added.values()) if one.requires_grad)
    made = f"from {recipe.model.path}" if recipe.model.path else "with new weights"
    kind = recipe.model.peft and recipe.model.peft["peft_type"]
    adapters = f", adapters of {kind}: {trained:,} parameters trained" if kind else ""
    yield f"model: {type(model).__name__} of {weights:,} parameters {made}, stored in {recipe.model.dtype}{adapters}"
    rows, text = _data(recipe, recipe.data, tokenizer)
    yield f"data: {text}"
    if recipe.evaluation_data is not None:
        yield f"evaluation: {_data(recipe, recipe.evaluation_data, tokenizer)[1]}"
    training, ranks = recipe.training, setup.plan.size("dp")
    size = recipe.rows_of_batch(setup)
    yield f"step: {training.batch_size} rows = {ranks} data ranks x {training.accumulation} batches x {size} rows"
    steps = steps_of(recipe, rows)
    yield f"steps: {steps}, which are {steps * training.batch_size / rows:.2f} epochs"
    kept = recipe.checkpoint
    if kept.folder is None:
        yield "checkpoints: none, so a run that is ended begins anew"
    else:
        yield f"checkpoints: {kept.folder}, {f'every {kept.every} steps and ' if kept.every else ''}after the last step"
    yield f"metrics: {recipe.folder}"


def _data(recipe: Recipe, data: DataSection, tokenizer: Any) -> tuple[int, str]:
    """Return how many rows *data* has, and what it is in words."""
    rows = rows_of(data, tokenizer, pairs=recipe.pairs)
    judge_rows(recipe.model, rows)
    tokens = sum(len(row.tokens) for row in rows)
    counted = sum(int((row.labels != IGNORED).sum()) for row in rows)
    packed = f", packed of {sum(len(row.lengths) for row in rows)}" if data.packing else ", in pairs" * recipe.pairs
    most = max(len(row.tokens) for row in rows)
    return len(rows), f"{data.path}: {len(rows)} rows{packed}, {tokens:,} tokens, at most {most}, {counted:,} labels"
