"""The command ``nemo-dist search``: read what is asked, search, and print a table and the calls to paste."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import attrs

from nemo_dist.plugin.comm_estimate import readable

if TYPE_CHECKING:
    from rich.table import Table

    from nemo_dist.search.estimate import Estimate
    from nemo_dist.search.ranking import Answer, Question

_DTYPES = ("float32", "bfloat16", "float16")  # whose rates a device states


@attrs.frozen(kw_only=True)
class SearchOptions:
    """What a user asks for on the command line; sizes that are None are searched."""

    model: str
    gpus: int
    memory: str | None
    seq: int
    batch: int
    hardware: str
    dtype: str
    strategies: tuple[str, ...]
    sizes: dict[str, int]
    across: bool
    imbalance: float

    def question(self) -> Question:
        """Return the question, with the model read; raise ValueError for what cannot be."""
        from nemo_dist.plugin.mixed_precision import storage_dtype
        from nemo_dist.search.hardware import Hardware, parse_bytes
        from nemo_dist.search.ranking import INSIDE, Question
        from nemo_dist.search.space import Space

        dtype = storage_dtype("--dtype", self.dtype, _DTYPES)
        hardware = Hardware.named(self.hardware)
        memory = hardware.memory if self.memory is None else parse_bytes(self.memory, "--memory")
        bounds = {} if self.across else dict.fromkeys(INSIDE, hardware.node)
        space = Space(
            world_size=self.gpus,
            fixed=self.sizes,
            bounds={axis: size for axis, size in bounds.items() if axis not in self.sizes},
            strategies=self.strategies or None,
        )
        from nemo_dist.models.meta_model import read_config  # imports torch: last, so that errors come fast
        from nemo_dist.search.model import SearchedModel

        return Question(
            space=space,
            model=SearchedModel(read_config(self.model), dtype),
            hardware=hardware,
            memory=memory,
            batch=self.batch,
            length=self.seq,
            imbalance=self.imbalance,
        )


def table(estimates: Iterable[Estimate]) -> Table:
    """Return a table of *estimates*, in their order."""
    from rich.table import Table

    from nemo_dist.search.paste import short

    found = Table(title="fits, fastest first", title_justify="left")
    for column in ("", "step", "tokens/s/GPU", "MFU", "memory", "rows", "topology"):
        found.add_column(column, justify="left" if column == "topology" else "right", no_wrap=column != "topology")
    for place, one in enumerate(estimates, 1):
        rows = f"{one.forwards}x{one.rows}"
        values = (f"{one.seconds:.2f} s", f"{one.tokens_per_second:,.0f}", f"{one.mfu:.0%}", readable(one.bytes), rows)
        found.add_row(str(place), *values, short(one.topology))
    return found


def details(place: int, estimate: Estimate) -> list[str]:
    """Return where the memory and the time of *estimate* go, and what to paste."""
    from nemo_dist.search.paste import call_text, section_text

    lines = [f"{place}. memory of the fullest rank" + (f", pipeline rank {estimate.stage}" if estimate.stage else "")]
    lines += [f"   {readable(size):>10}  {kind}" for kind, size in estimate.memory.items() if size]
    lines.append("   time of a step")
    lines += [f"   {seconds:>8.3f} s  {kind}" for kind, seconds in estimate.times.items() if seconds >= 0.0005]
    lines += ["", *(f"   {line}" for line in call_text(estimate.topology).splitlines())]
    section = section_text(estimate.topology)
    return [*lines, *(["", *(f"   {line}" for line in section.splitlines())] if section else []), ""]


def explained(question: Question) -> list[str]:
    """Return how the figures came about and what they leave out."""
    from nemo_dist.search.estimate import HOW, NOT_COUNTED
    from nemo_dist.search.ranking import RESERVE

    rate = question.hardware
    return [
        "how the figures came about",
        *(f"  {kind}: {how}" for kind, how in HOW.items()),
        f"  parameters are stored in {question.model.dtype} (--dtype says another)",
        f"  not counted: {NOT_COUNTED}; {RESERVE:.0%} of the memory is kept free for them",
        f"  time: counted FLOPs at {rate.compute_efficiency:.0%} of the data sheet, bytes of other operators at "
        f"{rate.memory_efficiency:.0%}, sent bytes at {rate.network_efficiency:.0%} ({rate.name}); collectives within "
        "layers overlap with nothing, those of the strategy with all computation; sends of a pipeline cost nothing",
        "  idle time of a pipeline: from its schedule, for equal stages; MFU: FLOPs of the model without recomputation",
    ]


def summary(answer: Answer) -> str:
    """Return how many topologies went which way."""
    parts = [f"{answer.enumerated:,} topologies that build accepts", f"{len(answer.ranked):,} fit"]
    parts += [f"{answer.too_large:,} need more memory"] if answer.too_large else []
    parts += [f"{answer.uneven:,} do not divide the batch"] if answer.uneven else []
    refused = sum(answer.refused.values())
    parts += [f"{refused:,} are refused for this model"] if refused else []
    return ", ".join(parts)


def nothing_fits(question: Question, answer: Answer) -> str:
    """Return why nothing fits, and the nearest thing that would."""
    from nemo_dist.search.paste import short
    from nemo_dist.search.ranking import RESERVE

    if not answer.enumerated:
        why = question.space.refusal()
        return f"no topology on {question.space.world_size} ranks is accepted by build" + (f": {why}" if why else "")
    if answer.nearest is None:
        reasons = "; ".join(reason for reason, _ in answer.refused.most_common(3))
        ways = f"; {reasons}" if reasons else ""
        if answer.uneven and not answer.refused:
            ways = f"; batch {question.batch} divides by none of their data-parallel sizes: use a multiple of one"
        return f"no topology on {question.space.world_size} ranks can be estimated ({summary(answer)}){ways}"
    need = int(answer.nearest.bytes / (1 - RESERVE)) + 1
    return (
        f"no topology on {question.space.world_size} ranks fits into {readable(question.memory)} ({summary(answer)}); "
        f"the smallest needs {readable(need)} a rank: {short(answer.nearest.topology)}; use devices of that much "
        "memory, more ranks, or shorter sequences"
    )


def as_data(answer: Answer, top: int) -> str:
    """Return the answer as JSON."""
    from nemo_dist.search.paste import section_text, short

    def one(estimate: Estimate) -> dict[str, Any]:
        return {
            "topology": short(estimate.topology),
            "seconds": estimate.seconds,
            "tokens_per_second_per_rank": estimate.tokens_per_second,
            "mfu": estimate.mfu,
            "rows": estimate.rows,
            "forwards": estimate.forwards,
            "memory": dict(estimate.memory),
            "times": dict(estimate.times),
            "section": section_text(estimate.topology),
        }

    data = {"enumerated": answer.enumerated, "fit": len(answer.ranked), "refused": dict(answer.refused)}
    return json.dumps({**data, "best": [one(estimate) for estimate in answer.ranked[:top]]}, indent=2)
