"""The job of one rank: load, resume, train, evaluate, save, export. Run as a module with the recipe as JSON."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch

from nemo_dist.checkpoint.run_folder import RunFolder
from nemo_dist.errors import CheckpointError, NemoDistError, TopologyError
from nemo_dist.mesh.process_group import DistEnv, initialize_distributed
from nemo_dist.mesh.store_consensus import brief, compare, reported
from nemo_dist.models.meta_model import in_one_line
from nemo_dist.planning.mesh_plan import Role
from nemo_dist.recipe.config import DataSection, Recipe
from nemo_dist.recipe.documents import files_of
from nemo_dist.recipe.metrics import Metrics, judge_logging
from nemo_dist.recipe.model import adapter_config, config_of, load_model
from nemo_dist.recipe.optimization import (
    give_back,
    make_loss,
    make_optimizer,
    make_schedule,
    options_of,
    tried_optimizer,
)
from nemo_dist.recipe.progress import Report, progress, say
from nemo_dist.recipe.reference_scores import score
from nemo_dist.recipe.refusals import (
    judge_rows,
    judge_schedule,
    refuse_other_steps,
    refuse_too_few_steps,
    say_what_stays,
)
from nemo_dist.recipe.row_stream import RowStream
from nemo_dist.recipe.throughput import Throughput
from nemo_dist.recipe.tokens import rows_of, tokenizer_of
from nemo_dist.setup.setup import DistributedSetup
from nemo_dist.training.runtime import Runtime

_MANY = 1000  # steps, of a schedule that is tried out before the rows of its epochs are counted


def main() -> None:
    """Train as one rank of the launcher; the only argument is the recipe as JSON."""
    run(Recipe.from_json(sys.argv[1]))


def run(recipe: Recipe) -> None:
    """Train as the rank that this process is, and leave the process group."""
    train(recipe)
    torch.distributed.destroy_process_group()


def train(recipe: Recipe) -> None:
    """Train from the newest checkpoint of the run on, where there is one; call it on every rank."""
    env = initialize_distributed("gloo" if recipe.distributed.get("device_type") == "cpu" else None)
    setup = recipe.setup(env.world_size)
    rank = setup.mesh_context.rank(Role.BATCH)
    with reported("reading the recipe and its data"), _in_words():
        judge(recipe)
        judge_schedule(recipe, setup)
        tokenizer = tokenizer_of(recipe.model, recipe.data)
        stream = stream_of(recipe, setup, tokenizer, recipe.data, rank)
        others = recipe.evaluation_data
        held_out = None if others is None else stream_of(recipe, setup, tokenizer, others, rank)
    _compare(recipe, {"rows": stream, "held-out rows": held_out})
    torch.manual_seed(recipe.training.seed)  # of the weights of a new model
    with setup.runtime(load_model(recipe.model, setup), loss=make_loss(recipe.loss)) as runtime:
        if recipe.pairs:
            score([stream, held_out], runtime)
        setup.seed(recipe.training.seed)
        evaluated = held_out.all(recipe.evaluate.rows) if held_out and recipe.evaluate else []
        job = Job.prepare(recipe, env, runtime, stream, evaluated)
        job.run()
        job.export(tokenizer)


@contextmanager
def _in_words() -> Iterator[None]:
    """Have what is wrong with a recipe end a rank in a sentence, without a traceback, as it ends the command line."""
    try:
        yield
    except NemoDistError:
        raise
    except (ValueError, OSError) as error:
        raise TopologyError([str(error)]) from error


@contextmanager
def _export_in_words(out: Path) -> Iterator[None]:
    """Raise CheckpointError for what ends a write to *out*; PEFT, safetensors and tokenizers have their own errors."""
    try:
        yield
    except NemoDistError:
        raise
    except Exception as error:
        raise CheckpointError(f"writing {out} failed: {in_one_line(error)}") from error


def _compare(recipe: Recipe, streams: Mapping[str, RowStream | None]) -> None:
    """Raise RankError where ranks have other rows, or another recipe, as from copies of files on several machines."""
    fields = {name: stream.state_dict()["digest"] for name, stream in streams.items() if stream is not None}
    for name, section in attrs.asdict(recipe, filter=lambda field, _: field.name != "given").items():
        fields |= {f"{name}.{key}": brief(value) for key, value in (section or {}).items()}
    compare("the recipe and its data", fields)


def judge(recipe: Recipe) -> None:
    """Raise ValueError for what the recipe asks for and is not there, or does not work when it is tried out."""
    for data in filter(None, (recipe.data, recipe.evaluation_data)):
        files_of(data.path)
    make_schedule(recipe.scheduler, tried_optimizer(recipe.optimizer), recipe.training.steps or _MANY)
    judge_logging(recipe.logging)
    make_loss(recipe.loss)
    adapter_config(recipe.model)
    if recipe.model.config is not None:
        config_of(recipe.model)


def stream_of(recipe: Recipe, setup: DistributedSetup, tokenizer: Any, data: DataSection, rank: int) -> RowStream:
    """Return the rows of *data* as data-parallel *rank* reads them.

    Raises ValueError for tokens and positions that the model does not have.
    """
    rows, known = rows_of(data, tokenizer, pairs=recipe.pairs), config_of(recipe.model).get_text_config().vocab_size
    positions = judge_rows(recipe.model, rows)
    pad = tokenizer.pad_token_id
    return RowStream(
        rows=rows,
        rows_of_batch=recipe.rows_of_batch(setup),
        accumulation=recipe.training.accumulation,
        ranks=setup.plan.size("dp"),
        rank=rank,
        seed=recipe.training.seed,
        shuffle=data.shuffle,
        pad_token=pad if pad is not None and pad < known else 0,  # it is masked, and counts for nothing
        packing=data.packing,
        together=2 if recipe.pairs else 1,
        positions=positions,
    )


def steps_of(recipe: Recipe, rows: int) -> int:
    """Return the steps of the run: those that the recipe gives, or those of its epochs over so many *rows*."""
    training = recipe.training
    if training.steps is not None:
        return training.steps
    return max(1, round((training.epochs or 0) * rows / training.batch_size))


@attrs.frozen(kw_only=True, eq=False)
class Job:
    """The loop of a run from step ``done`` to ``steps``, and all that is saved with it."""

    recipe: Recipe
    env: DistEnv
    runtime: Runtime
    stream: RowStream
    held_out: Sequence[Mapping[str, Any]]
    optimizer: Any
    schedule: Any
    folder: RunFolder | None
    steps: int
    done: int

    @classmethod
    def prepare(
        cls, recipe: Recipe, env: DistEnv, runtime: Runtime, stream: RowStream, held_out: Sequence[Mapping[str, Any]]
    ) -> Job:
        """Return the job with its optimizer and schedule, resumed from the newest checkpoint."""
        steps = steps_of(recipe, len(stream.rows))
        optimizer = make_optimizer(recipe.optimizer, runtime)
        schedule = make_schedule(recipe.scheduler, optimizer, steps)
        kept = recipe.checkpoint
        folder: RunFolder | None = None
        found: tuple[int, Any] | None = None
        if kept.folder is not None:
            folder = RunFolder(kept.folder, keep_last=kept.keep_last, keep_every=kept.keep_every)
            if kept.resume:
                options = options_of(optimizer)
                found = folder.resume(runtime, optimizer, schedulers=[schedule], data=stream)
            elif env.is_main:
                say_what_stays(folder)
            refuse_other_steps(recipe, found[0] if found else 0, stream.taken)
            if found is not None:
                refuse_too_few_steps(recipe, found[0], steps)
                changed = give_back(options, optimizer, schedule)
                if env.is_main and changed:
                    say(f"goes on as the recipe says now: {', '.join(changed)}")
        return cls(
            recipe=recipe,
            env=env,
            runtime=runtime,
            stream=stream,
            held_out=held_out,
            optimizer=optimizer,
            schedule=schedule,
            folder=folder,
            steps=steps,
            done=found[0] if found else 0,
        )

    def run(self) -> None:
        """Train the steps that are left."""
        for part in self.runtime.parts:
            part.train()
        recipe, main = self.recipe, self.env.is_main
        if main and self.done:
            say(f"goes on after step {self.done} of {self.folder and self.folder.path}")
        metrics, ranks = Metrics(), self.runtime.sharded.ranks
        if self.folder is not None and self.done < self.steps:
            with ranks.agreed(f"trying to write to {self.folder.path}"):  # not after hours of training
                if main:
                    self.folder.try_to_write()
        with ranks.agreed(f"opening the numbers of the run in {recipe.folder}"):
            if main:
                metrics = Metrics.open(recipe.logging, recipe.folder, self.done, recipe.given)
        speed = Throughput()
        if main:
            speed = Throughput.of(recipe.model, recipe.data.length, self.env.world_size)
        with closing(metrics), progress(self.steps, self.done, recipe.logging.every, main) as report:
            for step in range(self.done + 1, self.steps + 1):
                self._step(step, speed, metrics, report)

    def _step(self, step: int, speed: Throughput, metrics: Metrics, report: Report) -> None:
        """Train one step, write its numbers, and evaluate and save where it is time."""
        before, (rate, *_) = time.perf_counter(), self.schedule.get_last_lr()
        loss = self.runtime.forward_backward(self.stream.take())
        norm = self.runtime.clip_grad_norm_(self.recipe.training.clip or math.inf)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        values = {"loss": loss.item(), "norm": norm.item(), "lr": float(rate), "tokens": self.stream.tokens}
        values |= speed.measured(self.stream.tokens, time.perf_counter() - before)
        if step % self.recipe.logging.every == 0 or step == self.steps:
            values |= self.runtime.metrics()
        metrics.write(step, values)
        report(step, values)
        evaluate = self.recipe.evaluate
        if evaluate is not None and self._due(step, evaluate.every):
            found = {"held_out_loss": self.runtime.evaluate(self.held_out).item()}
            metrics.write(step, found)
            report(step, found)
        self._save(step)

    def _due(self, step: int, every: int | None) -> bool:
        return step == self.steps or (every is not None and step % every == 0)

    def _save(self, step: int) -> None:
        if self.folder is None:
            return
        state: dict[str, Any] = {"step": step, "schedulers": [self.schedule], "data": self.stream}
        kept = self.recipe.checkpoint
        if self._due(step, kept.every):
            self.folder.save(self.runtime, self.optimizer, **state, asynchronous=kept.asynchronous)
        if step < self.steps:
            self.folder.save_if_preempted(self.runtime, self.optimizer, **state, grace_seconds=kept.grace_seconds)

    def export(self, tokenizer: Any) -> None:
        """Write the trained model as transformers reads it, with its tokenizer; or its adapters, as PEFT reads them."""
        if self.recipe.checkpoint.export is None:
            return
        out, main = Path(self.recipe.checkpoint.export).expanduser(), self.env.is_main
        if self.recipe.model.peft is None:
            self.runtime.export(out)
        with reported(f"exporting to {out}"), _export_in_words(out):
            if self.recipe.model.peft is not None:  # embedding layers are shards, and not trained
                self.runtime.model.save_pretrained(out, is_main_process=main, save_embedding_layers=False)
            if main:
                tokenizer.save_pretrained(out)
        if main:
            say(f"exported to {out}")


if __name__ == "__main__":
    main()
