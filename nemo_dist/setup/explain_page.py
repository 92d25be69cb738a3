"""Draw a setup as one web page that needs nothing else: mesh, memory, schedule and collectives.

The page is ``page/page.html`` with the styles and scripts of that folder in it, and the data as JSON. Groups of ranks
are arithmetic, so the script makes them from the axes, and the data does not grow with the number of ranks.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import attrs

from nemo_dist.hf_model import without_adapters
from nemo_dist.planning.mesh_plan import MeshPlan, Role, View
from nemo_dist.planning.validation import integer
from nemo_dist.plugin.comm_estimate import ModelFacts
from nemo_dist.plugin.protocol import claimants
from nemo_dist.plugin.step_schedule import StepSchedule
from nemo_dist.setup.composition import Composition
from nemo_dist.setup.explain import facts_of, traffic
from nemo_dist.setup.rank_memory import memory_bars

_SCRIPTS = ("elements.js", "ranks.js", "mesh.js", "memory.js", "schedule.js", "collectives.js", "main.js")
_LANES, _TASKS = 64, 12_000  # that the picture of the schedule shows at most, unless two ranks have more


def page(setup: Composition, model: Any, rows: int, length: int | None, ranks_per_node: int) -> str:
    """Return the page as HTML; arguments as for ``DistributedSetup.explain_page``."""
    integer("ranks_per_node", ranks_per_node)
    folder = files("nemo_dist.setup").joinpath("page")
    parts = {
        "TITLE": html.escape(f"{setup.plan.world_size:,} ranks: {_shape(setup.plan)}"),
        "STYLE": folder.joinpath("page.css").read_text("utf-8"),
        "SCRIPT": "\n".join(folder.joinpath(name).read_text("utf-8") for name in _SCRIPTS),
        "DATA": _embedded(page_data(setup, model, rows, length, ranks_per_node)),
    }
    text = folder.joinpath("page.html").read_text("utf-8")
    for name, content in parts.items():
        before, found, after = text.partition(f"{{{{{name}}}}}")  # once, so that no content is searched for another
        text = before + content + after if found else text
    return text


def _embedded(data: Any) -> str:
    """Return *data* as JSON that may stand in a script element, which ``</script>`` or ``<!--`` in it would disturb."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def page_data(setup: Composition, model: Any, rows: int, length: int | None, ranks_per_node: int) -> dict[str, Any]:
    """Return all that the page shows, as values for JSON."""
    with without_adapters(model) as (plain, added):
        return _page_data(setup, plain, added, facts_of(setup, plain, rows, length, added), ranks_per_node)


def _page_data(
    setup: Composition, model: Any, added: Mapping[str, Any], facts: ModelFacts | None, ranks_per_node: int
) -> dict[str, Any]:
    plan = setup.plan
    schedule: StepSchedule | None = setup.calls.only("schedule", plan=plan, facts=facts, model=model)
    bars, notes = memory_bars(setup, model, added, facts, schedule)
    return {
        "version": version("nemo-dist"),
        "world_size": plan.world_size,
        "ranks_per_node": ranks_per_node,
        "shape": _shape(plan),
        "strategy": setup.strategy.name if setup.strategy else None,
        "recomputation": setup.recompute_mode,
        "layers_axis": next(iter(plan.dense.splitting(Role.LAYERS)), None),
        "views": [_view(setup, view) for view in (plan.dense, *plan.views)],
        "batch_axis": "dp",
        "plugins": setup.calls.explain(plan=plan, model=model),
        "model": None if facts is None else _model(model, facts),
        "memory": {"bars": [bar | {"modules": _shortened(bar["modules"])} for bar in bars], "notes": notes},
        "schedule": None if schedule is None else _schedule(schedule),
        "collectives": [attrs.asdict(one) for one in traffic(setup, facts, model)],
    }


def _shape(plan: MeshPlan) -> str:
    """Write the wide axes of the dense mesh with their sizes, outermost first: ``pp 4 x tp 8``."""
    return " \N{MULTIPLICATION SIGN} ".join(f"{a.name} {a.size}" for a in plan.dense.axes if a.size > 1) or "alone"


def _view(setup: Composition, view: View) -> dict[str, Any]:
    return {
        "name": view.name,
        "axes": [
            {
                "name": axis.name,
                "size": axis.size,
                "plugins": [plugin.name for plugin in claimants(setup.plugins, axis.name)],
                "splits": [role.name.lower() for role in axis.role if role.name],
            }
            for axis in view.axes
        ],
        "flattened": {name: list(run) for name, run in view.flattened.items()},
    }


def _model(model: Any, facts: ModelFacts) -> dict[str, Any]:
    return {
        "name": type(model).__name__,
        "parameters": facts.parameters,
        "blocks": facts.blocks,
        "stored": facts.stored,
        "rows": facts.rows,
        "length": facts.length,
    }


def _shortened(modules: Sequence[str]) -> str:
    """Write each run of consecutive layers as its first and last: ``embed_tokens, layers 0-7``."""
    runs: list[tuple[str, list[int]]] = []
    for name in modules:
        parent, _, last = name.rpartition(".")
        if not last.isdigit():
            runs.append((last, []))
        elif runs and runs[-1][1] and runs[-1][0] == parent and runs[-1][1][-1] + 1 == int(last):
            runs[-1][1].append(int(last))
        else:
            runs.append((parent, [int(last)]))
    texts: list[str] = []
    for position, (name, run) in enumerate(runs):
        numbers = f"{run[0]}\N{EN DASH}{run[-1]}" if run[1:] else "".join(map(str, run))
        again = position > 0 and runs[position - 1][0] == name  # layers 0-2, 18-21
        texts.append(numbers if again and run else f"{name.rpartition('.')[2]} {numbers}".strip())
    return ", ".join(texts)


def _schedule(schedule: StepSchedule) -> dict[str, Any]:
    """Return the lanes as flat lists of numbers, five for each task; of very many ranks those at even distances."""
    kinds = [kind for kind in schedule.kinds if any(task.kind == kind for lane in schedule.lanes for task in lane)]
    count = len(schedule.lanes)
    shown = _evenly(count, max(2, min(_LANES, _TASKS // max(map(len, schedule.lanes)))))
    left_out = [f"ranks at even distances are drawn, {len(shown)} of {count}"] if len(shown) < count else []
    return {
        "axis": schedule.axis,
        "name": schedule.name,
        "kinds": {kind: schedule.kinds[kind] for kind in kinds},
        "microbatches": schedule.microbatches,
        "rows": schedule.rows,
        "idle": schedule.idle,
        "stages": len(schedule.owners),
        "notes": [*schedule.notes, *left_out],
        "length": max(lane[-1].end for lane in schedule.lanes if lane),
        "lanes": [
            {
                "coordinate": place,
                "stages": [stage for stage, owner in enumerate(schedule.owners) if owner == place],
                "tasks": [
                    number
                    for task in schedule.lanes[place]
                    for number in (kinds.index(task.kind), task.stage, task.microbatch, task.start, task.end)
                ],
            }
            for place in shown
        ],
    }


def _evenly(count: int, most: int) -> list[int]:
    """Return at most *most* of the numbers below *count*, at even distances, with the first and the last."""
    if count <= most:
        return list(range(count))
    return sorted({round(index * (count - 1) / (most - 1)) for index in range(most)})
