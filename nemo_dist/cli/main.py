"""The command line: plan a mesh, list plugins, explain a setup, run the demo; torch is imported by the demo only."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemo_dist.cli.demo_config import DemoOptions
from nemo_dist.cli.setup_options import Config, SetupOptions, StoredDtype, WorldSize, stored_dtype, takes_setup
from nemo_dist.cli.tables import (
    fitted,
    groups_table,
    plan_data,
    plan_table,
    plugin_rows,
    plugins_table,
    rank_lines,
    wrapped,
)
from nemo_dist.errors import NemoDistError, TopologyError
from nemo_dist.planning.validation import integer
from nemo_dist.plugin.registry import Registry

if TYPE_CHECKING:
    from nemo_dist.cli.demo import Verdict

app = typer.Typer(
    name="nemo-dist",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # a plain --help can be piped and searched
    pretty_exceptions_enable=False,
)


def _examples(*arguments: str) -> str:
    """Return the examples for a command's help; the control character keeps their line breaks."""
    return "\n".join(["\b", "Examples:", *(f"  nemo-dist {line}" for line in arguments)])


Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def main() -> None:
    """Run the command line."""
    app()


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    """Distributed training of Hugging Face models as a composition of plugins."""
    if version:
        typer.echo(importlib.metadata.version("nemo-dist"))
        raise typer.Exit


@app.command(
    epilog=_examples(
        "plan --world-size 8",
        "plan --world-size 16384 --dp-replicate 64",
        "plan --world-size 8 --dp-replicate 2 --rank 5",
        "plan --world-size 8 --config recipe.yaml",
        "plan --world-size 8 --json",
    )
)
@takes_setup
def plan(
    asked: SetupOptions,
    world_size: WorldSize,
    rank: Annotated[int | None, typer.Option(help="Also say where this rank stands.")] = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Show the mesh of a setup: its axes, and which ranks form the groups along each.

    Needs no GPU, no other machine and no torch: plan for 16384 ranks on a laptop.
    """
    with _refusals():
        setup = asked.build(world_size, config)
        if rank is not None:
            setup.plan.coordinates(rank)  # raises for a rank that the plan does not have
        if as_json:
            typer.echo(json.dumps(plan_data(setup, rank), indent=2))
            return
    _show(plan_table(setup), groups_table(setup.plan), *([] if rank is None else rank_lines(setup.plan, rank)))


@app.command(
    epilog=_examples(
        "explain --world-size 8",
        "explain --world-size 16 --dp-replicate 2",
        "explain --world-size 8 --config recipe.yaml",
        "explain --world-size 64 --tp 8 --pp 2 --model my_model --rows 8 --html page.html",
    )
)
@takes_setup
def explain(
    asked: SetupOptions,
    world_size: WorldSize,
    model: Annotated[
        str | None, typer.Option(help="Count bytes for this model: a folder, a config file, or a name on the hub.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Sequences in the batch of one data-parallel rank.")] = 1,
    length: Annotated[int | None, typer.Option(help="Tokens of a sequence; the model's longest by default.")] = None,
    page: Annotated[Path | None, typer.Option("--html", help="Write a web page with pictures to this file.")] = None,
    per_node: Annotated[int, typer.Option("--per-node", help="Ranks on a machine, for the page.")] = 8,
    config: Config = None,
    dtype: StoredDtype = None,
) -> None:
    """Say who claims each axis and what every plugin will do, in order; with --html, as one page with pictures.

    The page shows the mesh, memory by stage, the schedule and the collectives of a step, and needs no network.
    """
    with _refusals():
        setup = asked.build(world_size, config)
        integer("per_node", per_node)
        stored = stored_dtype(dtype, config)
        found = None if model is None else _meta_model(model, stored)
        if page is None:
            typer.echo(wrapped(setup.explain(found, rows, length)))
            return
        drawn = setup.explain_page(found, rows, length, per_node)
        try:
            page.write_text(drawn, encoding="utf-8")
        except OSError as error:
            raise OSError(f"--html {page} cannot be written: {error.strerror}") from None
    typer.echo(f"wrote {page}")


plugins = typer.Typer(rich_markup_mode=None)
app.add_typer(plugins, name="plugins")


@plugins.callback(invoke_without_command=True, epilog=_examples("plugins", "plugins --json", "plugins check averaging"))
def list_plugins(context: typer.Context, as_json: Json = False) -> None:
    """List the installed plugins; one that fails to import is shown as broken, with the reason."""
    if context.invoked_subcommand is not None:
        return
    with _refusals():
        rows = plugin_rows(Registry())
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        _show(plugins_table(rows))


@plugins.command(
    "check", epilog=_examples("plugins check averaging", "plugins check moe --model qwen3-moe --law resumes")
)
def check_plugin(
    name: Annotated[str, typer.Argument(help="An installed plugin.", show_default=False)],
    model: Annotated[str, typer.Option(help="A tiny model of nemo_dist.testing.tiny_models.")] = "llama",
    law: Annotated[str, typer.Option(help="Only the tests of the kit with this in their names.")] = "",
    bound: Annotated[
        float | None, typer.Option(help="The relative error of a plugin that is inexact by design.")
    ] = None,
) -> None:
    """Run the conformance kit on an installed plugin: the contract, and training on ranks of this machine's CPU.

    Each of its axes gets size 2 in turn, and what it says it composes with is tried. A test that does not apply, or has
    something that it cannot try, is skipped and says why. The exit code is that of pytest, which runs the kit: 0 when
    the plugin passes.
    """
    with _refusals():
        from nemo_dist.cli.plugin_check import check

        code = check(name, model, law, bound)
    raise typer.Exit(code)


@app.command(
    "new-plugin", epilog=_examples("new-plugin token_meter", "new-plugin averaging2 --strategy --into packages")
)
def new_plugin(
    name: Annotated[str, typer.Argument(help="A lower-case identifier, like token_meter.", show_default=False)],
    strategy: Annotated[bool, typer.Option("--strategy", help="A strategy, which averages gradients.")] = False,
    into: Annotated[Path, typer.Option(help="The folder in which to make the package.")] = Path(),
) -> None:
    """Write the skeleton of a package that adds a plugin, with tests that pass."""
    with _refusals():
        from nemo_dist.cli.new_plugin import write

        folder = write(name, into, strategy)
    typer.echo(f"wrote {folder}; next:\n  pip install -e {folder}\n  nemo-dist plugins\n  pytest {folder}")


@app.command(
    epilog=_examples(
        "demo",
        "demo --tp 2 --nproc 2",
        "demo --dp-replicate 2 --steps 300 --out my_model",
        "demo --moe --ep 2 --tp 2",
    )
)
@takes_setup
def demo(
    asked: SetupOptions,
    nproc: Annotated[int, typer.Option("--nproc", "-n", help="How many ranks to start on this machine.")] = 4,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 160,
    out: Annotated[Path, typer.Option(help="Where to export the model.")] = Path("nemo_dist_demo"),
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the text windows.")] = 0,
    moe: Annotated[bool, typer.Option("--moe", help="Train a small mixture of experts instead.")] = False,
) -> None:
    """Train a small Llama on real text on several ranks of this machine, export it, and check the export.

    The text is the source of Python's standard library, byte by byte. Afterwards plain transformers loads the exported
    folder in one process and must compute the same loss as the ranks did; otherwise the exit code is 1.
    """
    with _refusals():
        options = DemoOptions(
            nproc=nproc,
            strategy=asked.strategy,
            sizes=asked.given,
            plugins=asked.plugin,
            steps=steps,
            out=out,
            seed=seed,
            moe=moe,
        )
        options.claim_folder()
        from nemo_dist.cli.demo import device_type

        typer.echo(options.setup(device_type=device_type(options)).explain())
    typer.echo(f"starting {nproc} ranks")
    sys.stdout.flush()
    from nemo_dist.launcher.launch import launch

    with _refusals(OSError):  # of the temporary folder for what ranks say
        code = launch("nemo_dist.cli.demo", [options.to_json()], nproc)
    if code:
        _show_cursor()
        raise typer.Exit(code)
    from nemo_dist.cli.demo import verify

    _report(verify(options), options)


@app.command(
    epilog=_examples(
        "train docs/examples/sft.yaml",
        "train docs/examples/sft.yaml --nproc 2 --set training.steps=10 --set checkpoint.folder=runs/short",
        "train docs/examples/moe.yaml --nproc 4 --dry-run",
    )
)
def train(
    recipe: Annotated[Path, typer.Argument(help="The YAML file of the job.", show_default=False)],
    nproc: Annotated[
        int | None, typer.Option("--nproc", "-n", help="How many ranks to start on this machine; one per GPU.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and start no rank.")] = False,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="Change a value: section.key=value; repeat it for more.")
    ] = None,
) -> None:
    """Train a causal language model as a YAML file says, and go on from its newest checkpoint where it has one.

    Starts ranks on this machine; under torchrun, srun or mpirun this process is one of theirs. On SIGTERM all ranks
    save the same step and end with code 75; the same command goes on from there. See docs/train.md.
    """
    with _refusals():
        from nemo_dist.mesh.launch_env import Launch
        from nemo_dist.recipe.config import Recipe

        asked = Recipe.from_yaml(recipe, changes or ())
        launch_of_ranks = Launch.read()
        if launch_of_ranks is not None and nproc is not None:
            raise ValueError(f"--nproc starts ranks, and this process is one already ({launch_of_ranks.told})")
        count = _ranks_here() if nproc is None else nproc
        setup = asked.setup(launch_of_ranks.world_size if launch_of_ranks else count)
        if dry_run:
            from nemo_dist.recipe.dry_run import described

            _silence_transformers()
            typer.echo(described(asked, setup))
            return
        from nemo_dist.recipe import job

        job.judge(asked)
    if launch_of_ranks is not None:
        with _refusals(NemoDistError):
            job.run(asked)
        return
    typer.echo(f"starting {count} ranks")
    sys.stdout.flush()
    from nemo_dist.launcher.launch import launch

    grace = asked.checkpoint.grace_seconds if asked.checkpoint.folder else 5
    with _refusals(OSError):  # as above
        code = launch("nemo_dist.recipe.job", [asked.to_json()], count, shutdown_seconds=grace)
    if code:
        _show_cursor()
        raise typer.Exit(code)


def _ranks_here() -> int:
    """Return how many ranks this machine is for: one per GPU, or one."""
    import torch

    return max(1, torch.cuda.device_count())


@app.command(
    epilog=_examples(
        "verify meta-llama/Llama-3.2-1B --tp 2",
        "verify my_model --cp 2 --dp 2",
        "verify my_model/config.json --config recipe.yaml --ranks 4",
    )
)
@takes_setup
def verify(
    asked: SetupOptions,
    model: Annotated[str, typer.Argument(help="A folder, a config file, or a name on the hub.", show_default=False)],
    ranks: Annotated[int, typer.Option(help="How many ranks to start on this machine at most.")] = 8,
    full: Annotated[bool, typer.Option("--full", help="Take the model as it is; it must fit into memory.")] = False,
    config: Config = None,
) -> None:
    """Prove that a setup trains your model as one process does, on ranks of this machine's CPU.

    The model is made tiny, with the same structure, and the topology small, with every axis kept. Compared are loss,
    every gradient, norm, three steps, save and load, and the export; where they differ, the first module and axis that
    do are named, and the exit code is 1. It is 1 too when the setup refuses the model.
    """
    with _refusals():
        from nemo_dist.testing.proof import verify as prove

        _silence_transformers()
        report = prove(asked.keywords(config), model, full=full, ranks=ranks)
    typer.echo(str(report))
    if not report.ok:
        raise typer.Exit(1)


@app.command(
    "dry-run",
    epilog=_examples(
        "dry-run my_model --world-size 16384 --tp 8",
        "dry-run my_model --world-size 16384 --tp 8 --pp 16 --rank 9000",
        "dry-run my_model/config.json --world-size 64 --config recipe.yaml --json",
    ),
)
@takes_setup
def dry_run(
    asked: SetupOptions,
    model: Annotated[Path, typer.Argument(help="A folder with a config.json, or such a file.", show_default=False)],
    world_size: WorldSize,
    rank: Annotated[int | None, typer.Option(help="The rank to rehearse; the first one of the setup.")] = None,
    config: Config = None,
    dtype: StoredDtype = None,
    as_json: Json = False,
) -> None:
    """Rehearse a run as one of its ranks, in this process and without weights: what it holds, reads and writes.

    The real functions run on torch's fake process group and the meta device: the mesh, the sharding, an optimizer's
    step, the plans of a save and a load.
    """
    with _refusals():
        from nemo_dist.dry_run.rehearsal import dry_run as rehearse

        _silence_transformers()
        found = rehearse(asked.keywords(config), model, world_size, rank, dtype=stored_dtype(dtype, config))
    typer.echo(json.dumps(found.data(), indent=2) if as_json else str(found))


@app.command(
    epilog=_examples(
        "search --model meta-llama/Llama-3.1-70B --gpus 64 --memory 80GiB --seq 8192 --batch 512",
        "search --model my_model/config.json --gpus 16 --seq 4096 --batch 64 --tp 8 --hardware a100-8x",
    )
)
def search(
    model: Annotated[str, typer.Option(help="A folder, a config file, or a name on the hub.", show_default=False)],
    gpus: Annotated[int, typer.Option(help="How many ranks.", show_default=False)],
    seq: Annotated[int, typer.Option(help="Tokens in a sequence.", show_default=False)],
    batch: Annotated[int, typer.Option(help="Sequences in a step, over all ranks.", show_default=False)],
    memory: Annotated[str | None, typer.Option(help="Of one device, as 80GiB; that of the hardware.")] = None,
    hardware: Annotated[str, typer.Option(help="A name, or my.yaml:NAME with numbers of your own.")] = "h100-8x",
    dtype: Annotated[str, typer.Option(help="The dtype that parameters are stored in.")] = "float32",
    strategy: Annotated[list[str] | None, typer.Option(help="Only these strategies; may be repeated.")] = None,
    tp: Annotated[int | None, typer.Option("--tp", help="Only this tensor-parallel size.")] = None,
    pp: Annotated[int | None, typer.Option("--pp", help="Only this pipeline-parallel size.")] = None,
    cp: Annotated[int | None, typer.Option("--cp", help="Only this context-parallel size.")] = None,
    ep: Annotated[int | None, typer.Option("--ep", help="Only this expert-parallel size.")] = None,
    dp: Annotated[int | None, typer.Option("--dp", help="Only this data-parallel size.")] = None,
    dp_replicate: Annotated[int | None, typer.Option("--dp-replicate", help="Only so many replicas.")] = None,
    across_nodes: Annotated[bool, typer.Option("--across-nodes", help="Let tp and ep leave a node, too.")] = False,
    imbalance: Annotated[float, typer.Option(help="Tokens of the fullest rank of ep, over its even share.")] = 1.25,
    top: Annotated[int, typer.Option(min=0, help="How many topologies to list.")] = 15,
    best: Annotated[int, typer.Option(min=0, help="For how many of them to print what to paste.")] = 1,
    as_json: Json = False,
) -> None:
    """Rank every topology that fits a model: estimated memory and time of a step, and the call to paste.

    Needs no GPU and no other machine. Choosing stays yours: the command prints, and changes nothing.
    """
    sizes = {"tp": tp, "pp": pp, "cp": cp, "ep": ep, "dp": dp, "dp_replicate": dp_replicate}
    from nemo_dist.cli import search as command

    with _refusals():
        from nemo_dist.search.ranking import search as run

        question = command.SearchOptions(
            model=model, gpus=gpus, memory=memory, seq=seq, batch=batch, hardware=hardware, dtype=dtype,
            strategies=tuple(strategy or ()), sizes={axis: size for axis, size in sizes.items() if size is not None},
            across=across_nodes, imbalance=imbalance,
        ).question()  # fmt: skip
        _silence_transformers()
        answer = run(question)
        if not answer.ranked:
            raise ValueError(command.nothing_fits(question, answer))
    if as_json:
        typer.echo(command.as_data(answer, top))
        return
    typer.echo(command.summary(answer))
    _show(command.table(answer.ranked[:top]))
    for place, estimate in enumerate(answer.ranked[:best], 1):
        typer.echo("\n".join(command.details(place, estimate)))
    typer.echo("\n".join(command.explained(question)))


@app.command(
    epilog=_examples(
        "export runs/llama exported",
        "export runs/llama/step-00001000 exported --dtype bfloat16",
        "export checkpoint exported --max-shard-size 2GB",
    )
)
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or the folder of a run.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The folder to write.", show_default=False)],
    dtype: Annotated[str | None, typer.Option(help="Cast the weights, to bfloat16, say.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file.")] = "5GB",
) -> None:
    """Make a plain Hugging Face folder of a checkpoint, in this process, whatever topology wrote it.

    Of the folder of a run, the newest checkpoint that is whole is taken. All checksums are verified first.
    """
    with _refusals():
        from nemo_dist.checkpoint.offline_export import export_checkpoint

        taken = export_checkpoint(checkpoint, out, dtype, max_shard_size)
    typer.echo(f"exported {taken} to {out}")


def _report(verdict: Verdict, options: DemoOptions) -> None:
    """Print the result of the demo; exit with code 1 when the losses of exported and trained model differ."""
    typer.echo(f"training loss {verdict.first_loss:.3f} -> {verdict.last_loss:.3f} in {options.steps} steps")
    typer.echo(
        f"held-out loss {verdict.distributed:.6f} on {options.nproc} ranks, {verdict.exported:.6f} in plain "
        f"transformers from {options.out} (relative difference {verdict.difference:.1e})"
    )
    if not verdict.equal and options.exact:
        typer.echo("error: the exported model does not compute the loss of the trained one", err=True)
        raise typer.Exit(1)
    typer.echo("a sample of what it writes:")
    typer.echo("\n".join(f"  | {line}" for line in verdict.sample.splitlines()))


@contextmanager
def _refusals(*kinds: type[Exception]) -> Iterator[None]:
    """Turn an error of the user's request, of *kinds* where given, into one block on stderr and exit code 2."""
    caught = kinds or (NemoDistError, ValueError, TypeError, OSError)
    try:
        yield
    except caught as error:
        count = len(error.problems) if isinstance(error, TopologyError) else 1
        lines = str(error) if count == 1 else f"{count} problems\n{error}"
        typer.echo(f"error: {lines.removeprefix('- ')}", err=True)
        raise typer.Exit(2) from None


def _meta_model(source: str, dtype: str | None) -> Any:
    import torch

    from nemo_dist.models.meta_model import meta_model

    _silence_transformers()
    return meta_model(source, None if dtype is None else getattr(torch, dtype))


def _silence_transformers() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _show(*things: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for thing in things:
        shown = fitted(thing, console) if isinstance(thing, Table) else thing
        console.print(shown, soft_wrap=isinstance(shown, str) and shown is not thing, markup=False)


def _show_cursor() -> None:
    """Show the cursor again, as a rank that is stopped while it shows a progress bar leaves it hidden."""
    from rich.console import Console

    Console().show_cursor()


if __name__ == "__main__":
    main()
