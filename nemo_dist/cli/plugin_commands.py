"""The commands for plugins: list and check them, and write a new one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemo_dist.cli.tables import (
    plugin_rows,
    plugins_table,
)
from nemo_dist.plugin.registry import Registry

if TYPE_CHECKING:
    pass


from nemo_dist.cli.terminal import Json, examples, refusals, show

commands = typer.Typer()


plugins = typer.Typer(rich_markup_mode=None)
commands.add_typer(plugins, name="plugins")


@plugins.callback(invoke_without_command=True, epilog=examples("plugins", "plugins --json", "plugins check averaging"))
def list_plugins(context: typer.Context, as_json: Json = False) -> None:
    """List the installed plugins; one that fails to import is shown as broken, with the reason."""
    if context.invoked_subcommand is not None:
        return
    with refusals():
        rows = plugin_rows(Registry())
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        show(plugins_table(rows))


@plugins.command(
    "check", epilog=examples("plugins check averaging", "plugins check moe --model qwen3-moe --law resumes")
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
    with refusals():
        from nemo_dist.cli.plugin_check import check

        code = check(name, model, law, bound)
    raise typer.Exit(code)


@commands.command(
    "new-plugin", epilog=examples("new-plugin token_meter", "new-plugin averaging2 --strategy --into packages")
)
def new_plugin(
    name: Annotated[str, typer.Argument(help="A lower-case identifier, like token_meter.", show_default=False)],
    strategy: Annotated[bool, typer.Option("--strategy", help="A strategy, which averages gradients.")] = False,
    into: Annotated[Path, typer.Option(help="The folder in which to make the package.")] = Path(),
) -> None:
    """Write the skeleton of a package that adds a plugin, with tests that pass."""
    with refusals():
        from nemo_dist.cli.new_plugin import write

        folder = write(name, into, strategy)
    typer.echo(f"wrote {folder}; next:\n  pip install -e {folder}\n  nemo-dist plugins\n  pytest {folder}")
