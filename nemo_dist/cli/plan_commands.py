"""The commands that plan, and start no ranks: plan, explain, dry-run, search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemo_dist.cli.setup_options import Config, SetupOptions, StoredDtype, WorldSize, stored_dtype, takes_setup
from nemo_dist.cli.tables import (
    groups_table,
    plan_data,
    plan_table,
    rank_lines,
    wrapped,
)
from nemo_dist.planning.validation import integer

if TYPE_CHECKING:
    pass


from nemo_dist.cli.terminal import Json, examples, refusals, show, silence_transformers

commands = typer.Typer()


@commands.command(
    epilog=examples(
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
    with refusals():
        setup = asked.build(world_size, config)
        if rank is not None:
            setup.plan.coordinates(rank)  # raises for a rank that the plan does not have
        if as_json:
            typer.echo(json.dumps(plan_data(setup, rank), indent=2))
            return
    show(plan_table(setup), groups_table(setup.plan), *([] if rank is None else rank_lines(setup.plan, rank)))


@commands.command(
    epilog=examples(
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
    with refusals():
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


@commands.command(
    "dry-run",
    epilog=examples(
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
    with refusals():
        from nemo_dist.dry_run.rehearsal import dry_run as rehearse

        silence_transformers()
        found = rehearse(asked.keywords(config), model, world_size, rank, dtype=stored_dtype(dtype, config))
    typer.echo(json.dumps(found.data(), indent=2) if as_json else str(found))


@commands.command(
    epilog=examples(
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

    with refusals():
        from nemo_dist.search.ranking import search as run

        question = command.SearchOptions(
            model=model, gpus=gpus, memory=memory, seq=seq, batch=batch, hardware=hardware, dtype=dtype,
            strategies=tuple(strategy or ()), sizes={axis: size for axis, size in sizes.items() if size is not None},
            across=across_nodes, imbalance=imbalance,
        ).question()  # fmt: skip
        silence_transformers()
        answer = run(question)
        if not answer.ranked:
            raise ValueError(command.nothing_fits(question, answer))
    if as_json:
        typer.echo(command.as_data(answer, top))
        return
    typer.echo(command.summary(answer))
    show(command.table(answer.ranked[:top]))
    for place, estimate in enumerate(answer.ranked[:best], 1):
        typer.echo("\n".join(command.details(place, estimate)))
    typer.echo("\n".join(command.explained(question)))


def _meta_model(source: str, dtype: str | None) -> Any:
    import torch

    from nemo_dist.models.meta_model import meta_model

    silence_transformers()
    return meta_model(source, None if dtype is None else getattr(torch, dtype))
