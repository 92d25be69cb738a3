"""The commands that run something: demo, train, verify, export."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemo_dist.cli.demo_config import DemoOptions
from nemo_dist.cli.setup_options import Config, SetupOptions, takes_setup
from nemo_dist.errors import NemoDistError

if TYPE_CHECKING:
    from nemo_dist.cli.demo import Verdict


from nemo_dist.cli.terminal import examples, refusals, show_cursor, silence_transformers

commands = typer.Typer()


@commands.command(
    epilog=examples(
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
    with refusals():
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

    with refusals(OSError):  # of the temporary folder for what ranks say
        code = launch("nemo_dist.cli.demo", [options.to_json()], nproc)
    if code:
        show_cursor()
        raise typer.Exit(code)
    from nemo_dist.cli.demo import verify

    _report(verify(options), options)


@commands.command(
    epilog=examples(
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
    with refusals():
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

            silence_transformers()
            typer.echo(described(asked, setup))
            return
        from nemo_dist.recipe import job

        job.judge(asked)
    if launch_of_ranks is not None:
        with refusals(NemoDistError):
            job.run(asked)
        return
    typer.echo(f"starting {count} ranks")
    sys.stdout.flush()
    from nemo_dist.launcher.launch import launch

    grace = asked.checkpoint.grace_seconds if asked.checkpoint.folder else 5
    with refusals(OSError):  # as above
        code = launch("nemo_dist.recipe.job", [asked.to_json()], count, shutdown_seconds=grace)
    if code:
        show_cursor()
        raise typer.Exit(code)


@commands.command(
    epilog=examples(
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
    with refusals():
        from nemo_dist.testing.proof import verify as prove

        silence_transformers()
        report = prove(asked.keywords(config), model, full=full, ranks=ranks)
    typer.echo(str(report))
    if not report.ok:
        raise typer.Exit(1)


@commands.command(
    epilog=examples(
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
    with refusals():
        from nemo_dist.checkpoint.offline_export import export_checkpoint

        taken = export_checkpoint(checkpoint, out, dtype, max_shard_size)
    typer.echo(f"exported {taken} to {out}")


def _ranks_here() -> int:
    """Return how many ranks this machine is for: one per GPU, or one."""
    import torch

    return max(1, torch.cuda.device_count())


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
