"""Plans and plugins as tables and as data for the command line; the form of the data is stable API."""

from __future__ import annotations

import inspect
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator
from importlib.metadata import EntryPoint
from itertools import islice
from typing import TYPE_CHECKING, Any

import attrs

from nemo_dist.planning.mesh_plan import MeshPlan, View
from nemo_dist.plugin.protocol import Stage, claimant, declared
from nemo_dist.plugin.registry import Registry

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    from nemo_dist.setup.setup import DistributedSetup

_FEW = 4  # groups, and ranks of a group, that a table shows
_BROKEN = "\N{HORIZONTAL ELLIPSIS}"  # what rich puts for the rest of a word
_JOINED = "\N{NO-BREAK SPACE}"


def plan_data(setup: DistributedSetup, rank: int | None = None) -> dict[str, Any]:
    """Return the whole plan of *setup*: views, axes and the plugins that claim them, and every group of ranks."""
    plan = setup.plan
    data: dict[str, Any] = {
        "world_size": plan.world_size,
        "plugins": [plugin.name for plugin in setup.plugins],
        "views": [_view_data(setup, view) for view in (plan.dense, *plan.views)],
        "groups": {name: [list(group) for group in plan.groups(name)] for name in _names(plan)},
    }
    if rank is not None:
        data["rank"] = {
            "rank": rank,
            "coordinates": _place(plan, rank),
            "dp_rank": plan.dp_rank(rank),
            "batch_ranks": list(plan.batch_ranks(rank)),
        }
    return data


def _view_data(setup: DistributedSetup, view: View) -> dict[str, Any]:
    return {
        "name": view.name,
        "axes": [
            {"name": axis.name, "size": axis.size, "plugin": _claimant(setup, axis.name) if axis.size > 1 else None}
            for axis in view.axes
        ],
        "flattened": {name: {"axes": list(run), "size": view.size_of(name)} for name, run in view.flattened.items()},
    }


def _names(plan: MeshPlan) -> list[str]:
    """Return every axis and flattened name of all views, each once, as views may share their leading axes."""
    views = (plan.dense, *plan.views)
    return list(dict.fromkeys(name for view in views for name in (*view.names, *view.flattened)))


def _claimant(setup: DistributedSetup, axis: str) -> str | None:
    found = claimant(setup.plugins, axis)
    return found.name if found else None


def _place(plan: MeshPlan, rank: int) -> dict[str, int]:
    place: dict[str, int] = {}
    for view in (plan.dense, *plan.views):
        place |= plan.coordinates(rank, view.name)
    return place


def plan_table(setup: DistributedSetup) -> Table:
    """Return a table of the axes of every view, outermost first, with their sizes and the plugins that claim them."""
    from rich.table import Table

    names = ", ".join(plugin.name for plugin in setup.plugins)
    table = Table(title=f"{setup.plan.world_size} ranks, plugins: {names}", title_justify="left")
    for column in ("view", "axis", "size", "claimed by"):
        table.add_column(column, justify="right" if column == "size" else "left")
    for view in (setup.plan.dense, *setup.plan.views):
        for axis in view.axes:
            by = _claimant(setup, axis.name) if axis.size > 1 else None
            table.add_row(view.name, axis.name, str(axis.size), by or "-", style=None if axis.size > 1 else "dim")
    return table


def groups_table(plan: MeshPlan) -> Table:
    """Return a table of the groups of ranks along every axis and flattened name of size above 1."""
    from rich.table import Table

    table = Table(title="groups", title_justify="left")
    for column in ("along", "groups", "of", "ranks"):
        table.add_column(column, justify="right" if column in ("groups", "of") else "left")
    for name in _names(plan):
        size = plan.size(name)
        if size > 1:
            count = plan.world_size // size
            shown = [_shorten(group) for group in islice(plan.groups(name), _FEW)] + ["..."] * (count > _FEW)
            table.add_row(name, str(count), str(size), _Groups(tuple(shown)))
    if not table.row_count:
        table.add_row("-", "0", "-", "every rank is alone")
    return table


@attrs.frozen
class _Groups:
    """Groups of ranks in a cell of a table; a line ends between two groups only."""

    groups: tuple[str, ...]

    def __str__(self) -> str:
        return "  ".join(self.groups)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        from rich.measure import Measurement

        return Measurement(max(map(len, self.groups)), len(str(self)))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        from rich.text import Text

        whole = "  ".join(group.replace(" ", _JOINED) for group in self.groups)
        for line in textwrap.wrap(whole, options.max_width, break_long_words=False):
            yield Text(line.replace(_JOINED, " "))


def _shorten(group: Iterable[int]) -> str:
    ranks = list(group)
    if len(ranks) <= 2 * _FEW:
        return "[" + " ".join(map(str, ranks)) + "]"
    return "[" + " ".join(map(str, ranks[:_FEW])) + f" ... {ranks[-1]}]"


def rank_lines(plan: MeshPlan, rank: int) -> list[str]:
    """Return the coordinates of *rank* and the ranks that read the same batch, in two lines."""
    place = ", ".join(f"{axis} {index}" for axis, index in _place(plan, rank).items())
    others = [other for other in plan.batch_ranks(rank) if other != rank]
    alike = f"like {_shorten(others)}" if others else "alone"
    return [f"rank {rank}: {place}", f"it reads batch {plan.dp_rank(rank)} of {plan.size('dp')}, {alike}"]


def fitted(table: Table, console: Console) -> Table | str:
    """Return *table* or, where the columns of *console* would break words in it, its rows one below the other."""
    from rich.text import Text

    with console.capture() as printed:
        console.print(table)
    if _BROKEN not in printed.get():
        return table
    heads = [str(column.header) for column in table.columns]
    lines = [str(table.title)] if table.title else []
    for cells in zip(*(column.cells for column in table.columns), strict=True):
        first, *others = (Text.from_markup(str(cell)).plain for cell in cells)
        lines.append(f"{heads[0]} {first}")
        lines += [f"  {head}: {cell}" for head, cell in zip(heads[1:], others, strict=True) if cell]
    return "\n".join(_folded(line, console.width) for line in lines)


def wrapped(text: str) -> str:
    """Break the lines of *text* between words where the terminal is narrower, with what follows indented; else as is.

    Without a terminal lines stay whole, unless the environment says how many ``COLUMNS`` there are.
    """
    if not sys.stdout.isatty() and "COLUMNS" not in os.environ:
        return text
    columns = shutil.get_terminal_size().columns
    return "\n".join(_folded(line, columns) for line in text.splitlines())


def _folded(line: str, columns: int) -> str:
    start = " " * (len(line) - len(line.lstrip()))
    words = textwrap.TextWrapper(
        columns, initial_indent=start, subsequent_indent=f"{start}    ", break_long_words=False, break_on_hyphens=False
    )
    return line if len(line) <= columns else words.fill(line.strip())


def plugin_rows(registry: Registry) -> list[dict[str, Any]]:
    """Return a row per installed plugin, as ``nemo-dist plugins --json`` prints it.

    ``error`` is None, or why the plugin cannot be used; then what its class would say is None or empty.
    """
    return [_plugin_row(registry, *found) for found in registry.catalogue()]


def _plugin_row(registry: Registry, entry: EntryPoint, plugin: Any, error: str | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": entry.name,
        "distribution": entry.dist.name if entry.dist else None,
        "version": entry.dist.version if entry.dist else None,
        "entry_point": entry.value,
        "default_for": sorted(role.name for role in registry.roles if role.value == entry.name),
        "aliases": sorted(alias.name for alias in registry.aliases if alias.value == entry.name),
        "order": {"number": None, "name": None},
        "axes": [],
        "roles": {},
        "composes_with": [],
        "options": [],
        "doc": None,
        "error": error,
    }
    try:
        return row if plugin is None else row | _declared(plugin)
    except Exception as wrong:  # whatever a class that is no plugin declares
        what = f"{type(wrong).__name__}: {wrong}"
        return row | {"error": f"plugin {entry.name!r} ({entry.value}) cannot be listed: {what}"}


def _declared(plugin: Any) -> dict[str, Any]:
    """Return what the class of a plugin says of it."""
    names = {int(stage): stage.name for stage in Stage}
    number = int(plugin.stage)
    return {
        "order": {"number": number, "name": names.get(number)},  # a third party's plugin may act in between
        "axes": sorted(plugin.axes),
        "roles": {axis: role.name for axis, role in sorted(declared(plugin, "roles").items())},
        "composes_with": sorted(plugin.composes_with),
        "options": _options(plugin.config_type),
        "doc": (inspect.getdoc(plugin) or "").partition("\n")[0],
    }


def _options(config: type) -> list[dict[str, Any]]:
    """Return name, type and default of every option of a *config* class; a default that JSON lacks is its text."""
    fields = attrs.fields(config) if attrs.has(config) else ()
    shared = config() if attrs.has(config) else None
    return [
        {
            "name": field.alias or field.name,
            "type": field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type)),
            "default": _plain(getattr(shared, field.name)),
        }
        for field in fields
        if field.init
    ]


def _plain(value: Any) -> Any:
    """Return *value* where JSON has it, lists for tuples, and else its text."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or type(value) in (bool, int, float, str) else repr(value)


def plugins_table(rows: Iterable[dict[str, Any]]) -> Table:
    """Return the rows of ``plugin_rows`` as a table."""
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    for column in ("plugin", "from", "order", "axes", "what it does"):
        table.add_column(column, no_wrap=column == "plugin")
    for row in rows:
        origin = f"{row['distribution']} {row['version']}" if row["distribution"] else "?"
        if row["error"]:
            table.add_row(row["name"], origin, "BROKEN", "", escape(row["error"]), style="red")
        else:
            order = row["order"]["name"] or str(row["order"]["number"])
            table.add_row(row["name"], origin, order, " ".join(row["axes"]) or "-", escape(row["doc"]))
    if not table.row_count:
        table.add_row("-", "", "", "", "no plugin is installed")
    return table
