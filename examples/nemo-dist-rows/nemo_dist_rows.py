"""An axis of its own: the ranks along ``rows`` read one batch, and each computes some of its rows."""

import attrs

from nemo_dist import Role, RuntimePart, Stage, hookimpl


@attrs.frozen
class RowsConfig:
    """There is nothing to choose; ``ParallelismSizes(extra={"rows": 2})`` says how many ranks share a batch."""

    plugin = "rows"


@attrs.frozen(eq=False)
class Rows:
    """Let the ranks of the axis rows share a batch by its rows, so that fewer ranks read data."""

    name, config_type, stage = "rows", RowsConfig, Stage.CONTEXT + 5
    axes, composes_with = frozenset({"rows"}), frozenset({"fsdp2", "ddp"})
    # As with cp, a batch is read by several ranks, which compute different tokens of it.
    roles = {"rows": Role.SEQUENCE}

    config: RowsConfig = attrs.field(factory=RowsConfig)

    @hookimpl
    def runtime(self, mesh):
        size, rank = mesh.size("rows"), mesh.rank("rows")
        return RuntimePart(batch=lambda batch: share(batch, size, rank)) if size > 1 else None

    @hookimpl
    def explain(self, plan):
        ranks = plan.size("rows") if "rows" in plan.dense else 1
        return f"rows: {ranks} ranks share the rows of a batch" if ranks > 1 else "rows: nothing to do, its size is 1"


def share(batch, size, rank):
    """Return the rows of *batch* that *rank* of *size* computes; the first ranks get one more where they differ."""
    rows = len(batch["input_ids"])
    if rows < size:
        raise ValueError(f"a batch of {rows} rows cannot be shared by {size} ranks of 'rows'; read {size} or more")
    mine = slice(*(place * (rows // size) + min(place, rows % size) for place in (rank, rank + 1)))
    return {name: part(name, value, rows, mine) for name, value in batch.items()}


def part(name, value, rows, mine):
    """Return the rows *mine* of a tensor, and anything else as it is."""
    if not hasattr(value, "shape") or (name == "position_ids" and len(value) == 1):
        return value
    if len(value) != rows:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, not an entry for each of {rows} rows; leave it out")
    return value[mine]
