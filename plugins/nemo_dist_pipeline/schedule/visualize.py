"""Show a pipeline: its stages as a table, its schedule as a picture in text or SVG; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nemo_dist_pipeline.schedule.actions import Order
from nemo_dist_pipeline.schedule.simulation import Slot, Timeline, simulate

if TYPE_CHECKING:
    from nemo_dist_pipeline.schedule.stage_placement import StagePlacement

_FILL = {"F": "#4c78c8", "B": "#5aa469", "I": "#5aa469", "W": "#d9a441"}
WHAT = {"F": "forward", "B": "backward", "I": "backward, inputs", "W": "backward, weights"}


def summary(division: Sequence[Sequence[str]], placement: StagePlacement, parts: Sequence[Any], order: Order) -> str:
    """Return a table of all stages, with the parameters of this rank's, and the schedule with its bubble."""
    counts = {part.pipeline_stage.index: sum(p.numel() for p in part.parameters()) for part in parts}
    lines = [f"{'stage':>5}  {'rank':>4}  {'parameters':>12}  modules"]
    for index, modules in enumerate(division):
        count = f"{counts[index]:,}" if index in counts else "-"
        lines.append(f"{index:>5}  {placement.rank_of(index, len(division)):>4}  {count:>12}  {_shortened(modules)}")
    microbatches = 1 + max(action.microbatch for line in order for action in line)
    bubble = f"{simulate(order).bubble:.1%} bubble in theory with {microbatches} microbatches"
    return "\n".join([*lines, f"schedule {placement.name}: {bubble}"])


def _shortened(modules: Sequence[str]) -> str:
    """Write a run of layers as its first and last."""
    layers = [name for name in modules if name.rsplit(".", 1)[-1].isdigit()]
    if len(layers) < 3:
        return ", ".join(modules)
    start = list(modules).index(layers[0])
    run = f"{layers[0]} ... {layers[-1]}"
    return ", ".join([*modules[:start], run, *modules[start + len(layers) :]])


def picture(order: Order, form: str = "text") -> str:
    """Return a picture of *order*: a row per rank, time to the right; ``form`` is "text" or "svg"."""
    timeline = simulate(order)
    if form == "text":
        return _text(timeline)
    if form == "svg":
        return _svg(timeline)
    raise ValueError(f"form must be 'text' or 'svg' (got {form!r})")


def _label(slot: Slot, several: bool) -> str:
    """Write kind and microbatch, after the stage where a rank has several."""
    return f"{slot.action.stage if several else ''}{slot.action.kind}{slot.action.microbatch}"


def _several(timeline: Timeline) -> bool:
    return any(len({slot.action.stage for slot in slots}) > 1 for slots in timeline.ranks)


def _text(timeline: Timeline) -> str:
    several = _several(timeline)
    width = 1 + max(len(_label(slot, several)) for slots in timeline.ranks for slot in slots)
    lines = []
    for rank, slots in enumerate(timeline.ranks):
        cells = ["."] * timeline.length
        for slot in slots:
            label = _label(slot, several)
            cells[slot.start : slot.end] = [label, *["-" * len(label)] * (slot.end - slot.start - 1)]
        lines.append(f"rank {rank}  " + "".join(cell.ljust(width) for cell in cells).rstrip())
    return "\n".join([*lines, f"idle {timeline.bubble:.1%}"])


def _svg(timeline: Timeline) -> str:
    unit, height, left, gap = 26, 26, 60, 4
    several = _several(timeline)
    rows = len(timeline.ranks)
    wide, high = left + timeline.length * unit + 10, rows * (height + gap) + 40
    kinds = [kind for kind in _FILL if any(slot.action.kind == kind for slots in timeline.ranks for slot in slots)]
    body = []
    for rank, slots in enumerate(timeline.ranks):
        y = rank * (height + gap) + 6
        body.append(f'<text x="6" y="{y + 17}" font-size="12" fill="#555">rank {rank}</text>')
        body.append(
            f'<rect x="{left}" y="{y}" width="{timeline.length * unit}" height="{height}" fill="#888" opacity="0.15"/>'
        )
        for slot in slots:
            x, length = left + slot.start * unit, (slot.end - slot.start) * unit
            # Later stages of a rank are paler.
            local = sorted({other.action.stage for other in slots}).index(slot.action.stage)
            shade = max(0.45, 1 - 0.3 * local)
            body.append(
                f'<rect x="{x}" y="{y}" width="{length - 1}" height="{height}" rx="3" '
                f'fill="{_FILL[slot.action.kind]}" opacity="{shade:.2f}"/>'
                f'<text x="{x + length / 2:.0f}" y="{y + 17}" font-size="9" text-anchor="middle" fill="#000">'
                f"{_label(slot, several)}</text>"
            )
    y = rows * (height + gap) + 14
    for index, kind in enumerate(kinds):
        x = left + index * 150
        body.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{_FILL[kind]}"/>')
        body.append(f'<text x="{x + 18}" y="{y + 10}" font-size="11" fill="#555">{WHAT[kind]} ({kind})</text>')
    body.append(
        f'<text x="{left + len(kinds) * 150}" y="{y + 10}" font-size="11" fill="#555">idle {timeline.bubble:.1%}</text>'
    )
    wide = max(wide, left + len(kinds) * 150 + 90)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide}" height="{high}" viewBox="0 0 {wide} {high}" '
        f'font-family="monospace">\n' + "\n".join(body) + "\n</svg>\n"
    )
