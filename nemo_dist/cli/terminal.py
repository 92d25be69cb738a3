"""What all commands share: examples in help, refusals, what is printed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemo_dist.cli.tables import (
    fitted,
)
from nemo_dist.errors import NemoDistError, TopologyError

if TYPE_CHECKING:
    pass


def examples(*arguments: str) -> str:
    """Return the examples for a command's help; the control character keeps their line breaks."""
    return "\n".join(["\b", "Examples:", *(f"  nemo-dist {line}" for line in arguments)])


Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


@contextmanager
def refusals(*kinds: type[Exception]) -> Iterator[None]:
    """Turn an error of the user's request, of *kinds* where given, into one block on stderr and exit code 2."""
    caught = kinds or (NemoDistError, ValueError, TypeError, OSError)
    try:
        yield
    except caught as error:
        count = len(error.problems) if isinstance(error, TopologyError) else 1
        lines = str(error) if count == 1 else f"{count} problems\n{error}"
        typer.echo(f"error: {lines.removeprefix('- ')}", err=True)
        raise typer.Exit(2) from None


def silence_transformers() -> None:
    """Keep progress bars and warnings of transformers out of what a command prints."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def show(*things: Any) -> None:
    """Print lines of text, and tables as wide as the terminal allows."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for thing in things:
        shown = fitted(thing, console) if isinstance(thing, Table) else thing
        console.print(shown, soft_wrap=isinstance(shown, str) and shown is not thing, markup=False)


def show_cursor() -> None:
    """Show the cursor again, as a rank that is stopped while it shows a progress bar leaves it hidden."""
    from rich.console import Console

    Console().show_cursor()
