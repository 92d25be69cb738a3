"""The command line: its commands by subject; torch is imported only by those that run or count something."""

from __future__ import annotations

import importlib.metadata
from typing import Annotated

import typer

from nemo_dist.cli import plan_commands, plugin_commands, run_commands

app = typer.Typer(
    name="nemo-dist",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # a plain --help can be piped and searched
    pretty_exceptions_enable=False,
)
for part in (plan_commands, plugin_commands, run_commands):
    app.add_typer(part.commands)


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


if __name__ == "__main__":
    main()
