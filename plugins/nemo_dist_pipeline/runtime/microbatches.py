"""Split the batches of a step into microbatches of equal size, each with its weight in the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor, nn

from nemo_dist.hf_model import IGNORED
from nemo_dist.plugin.hookspecs import Batch
from nemo_dist.training.loss_weighting import count_labels
from nemo_dist.training.router_aux_loss import COUNTED
from nemo_dist.training.step_loss import ROWS, at_least_something
from nemo_dist_pipeline.schedule.stage_placement import StagePlacement

if TYPE_CHECKING:
    from nemo_dist_pipeline.config import PipelineConfig

_LABELS = ("labels", "shift_labels")


@attrs.frozen(eq=False)
class Unsplit:
    """A value that every microbatch gets as it is; torch's schedules would split the tensors in it."""

    value: Any


@attrs.frozen(eq=False)
class Microbatches:
    """The inputs of one run of a schedule.

    ``inputs`` are tensors of ``count * size`` rows (what has no rows is passed to every microbatch as it is);
    ``weights`` is the weight of each microbatch's mean loss, a float32 tensor of ``count``.
    """

    inputs: Mapping[str, Any]
    weights: Tensor
    count: int
    rows: int

    @property
    def shape(self) -> tuple[Any, ...]:
        """What two runs must have in common to use the same buffers."""
        shapes = tuple((name, value.shape[1:]) for name, value in self.inputs.items() if isinstance(value, Tensor))
        return self.count, shapes

    @property
    def arguments(self) -> dict[str, Any]:
        """The inputs as torch's schedule takes them, with what has no rows in an ``Unsplit``."""
        return {name: value if _has_rows(value, self.rows) else Unsplit(value) for name, value in self.inputs.items()}

    def goes_with(self, other: Microbatches) -> bool:
        """Whether *other*, of the same shape, has the same values without rows, of which a run passes one to all."""
        return self.inputs.keys() == other.inputs.keys() and all(
            _same(value, other.inputs[name]) for name, value in self.inputs.items() if not _has_rows(value, self.rows)
        )

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the inputs of microbatch *index*."""
        size = self.rows // self.count
        return {
            name: value[index * size : (index + 1) * size] if _has_rows(value, self.rows) else value
            for name, value in self.inputs.items()
        }

    @classmethod
    def of(
        cls, model: nn.Module, batch: Batch, weight: Tensor, size: int, minimum: int, loss: Any = None
    ) -> Microbatches:
        """Split *batch* into microbatches of *size* rows, at least *minimum* of them.

        Missing rows are copies of the first one, with labels that are ignored. The mean loss of a microbatch is
        weighted by its share of the batch's labels, so that the weighted losses sum to *weight* times the mean loss of
        the batch, however the labels are spread. With a *loss* that is a sum, every microbatch has *weight* itself.
        """
        given, rows = by_rows(batch)
        count = max(minimum, -(-rows // size))
        if loss is not None:
            ones = torch.ones(rows, dtype=torch.int32, device="cpu")
            padded = _padded({ROWS: ones, **given}, rows, count * size)
            return cls(padded, weight.float().expand(count), count, count * size)
        padded = _padded(given, rows, count * size)
        whole = cls(padded, weight.new_empty(0), count, count * size)
        counts = torch.stack([count_labels(model, whole[index]) for index in range(count)])
        weights = weight.float() * counts.to(weight.device) / at_least_something(counts.sum()).to(weight.device)
        return attrs.evolve(whole, weights=weights)

    @classmethod
    def without_loss(cls, batch: Batch, size: int, minimum: int) -> Microbatches:
        """Split *batch* as ``of`` does, with or without labels, for forwards of which nobody weighs a loss."""
        given, rows = by_rows(batch)
        count = max(minimum, -(-rows // size))
        return cls(_padded(given, rows, count * size), torch.empty(0), count, count * size)

    @classmethod
    def joined(cls, runs: Sequence[Microbatches]) -> Microbatches:
        """Return one run of all the microbatches of *runs*, whose shapes are equal."""
        first, rows = runs[0], sum(run.rows for run in runs)
        inputs = {
            name: torch.cat([run.inputs[name] for run in runs]) if _has_rows(value, first.rows) else value
            for name, value in first.inputs.items()
        }
        return cls(inputs, torch.cat([run.weights for run in runs]), sum(run.count for run in runs), rows)


@attrs.frozen(kw_only=True)
class MicrobatchSplitter:
    """Split batches as the options and the schedule ask; ``hidden`` gives the shape of hidden states."""

    config: PipelineConfig
    placement: StagePlacement
    cp_size: int
    hidden: Callable[[int, int], tuple[int, ...]]

    @property
    def minimum(self) -> int:
        """The number of microbatches that a smaller batch is padded to; 0 pads none."""
        return self.placement.microbatches or self.config.microbatches

    def split(self, model: nn.Module, batch: Batch, weight: Tensor, loss: Any = None) -> Microbatches:
        """Return the microbatches of *batch*; raise ValueError where it does not fit the options."""
        run = Microbatches.of(model, batch, weight, self.config.pp_microbatch_size, self.minimum, loss)
        length = self._length(run) * self.cp_size
        if self.config.pp_seq_len not in (None, length):
            raise ValueError(
                f"the batch has sequences of {length} tokens, but pp_seq_len is {self.config.pp_seq_len}; pad it "
                "to that, or leave pp_seq_len out"
            )
        if self.minimum and run.count > self.minimum:
            limit = self.minimum * self.config.pp_microbatch_size
            what = "pp_schedule_csv" if self.placement.microbatches else "pp_batch_size"
            raise ValueError(
                f"the batch has {run.count} microbatches of {self.config.pp_microbatch_size} rows, but {what} is for "
                f"{self.minimum} ({limit} rows); pass smaller batches, or a list of them"
            )
        return run

    def joined(self, runs: list[Microbatches]) -> list[Microbatches]:
        """Return *runs* joined into one where they fit together, so that the pipeline fills and drains only once.

        Raises ValueError for a run that does not fit the schedule.
        """
        together = (
            len(runs) > 1
            and self.placement.joins
            and len({run.shape for run in runs}) == 1
            and all(runs[0].goes_with(run) for run in runs[1:])
            and not self.placement.microbatch_problem(sum(run.count for run in runs))
        )
        joined = [Microbatches.joined(runs)] if together else runs
        for run in joined:
            if problem := self.placement.microbatch_problem(run.count):
                raise ValueError(
                    f"{problem}; a batch of {run.rows} rows was split by pp_microbatch_size="
                    f"{self.config.pp_microbatch_size}. Pass a list of batches of one shape, forward_backward([...]), "
                    "whose microbatches run through the schedule together (packed rows, say), or larger batches, or "
                    "set pp_batch_size: smaller ones are then filled up with rows that do not count"
                )
        return joined

    def hidden_shape(self, run: Microbatches) -> tuple[int, ...]:
        """Return the shape of the hidden states of one microbatch between stages, mostly (rows, length, width)."""
        return self.hidden(run.rows // run.count, self._length(run))

    @staticmethod
    def _length(run: Microbatches) -> int:
        source = run.inputs.get("input_ids", run.inputs.get("inputs_embeds"))
        if source is None:
            raise ValueError(f"the batch has neither input_ids nor inputs_embeds (it has {sorted(run.inputs)})")
        return int(source.shape[1])


def by_rows(batch: Batch) -> tuple[dict[str, Any], int]:
    """Return *batch* with one row of every tensor for each of its rows, and their number; raise ValueError if not."""
    rows = _rows(batch)
    return {name: _aligned(name, value, rows) for name, value in batch.items()}, rows


def _rows(batch: Batch) -> int:
    for name in ("input_ids", "inputs_embeds", "labels"):
        if isinstance(batch.get(name), Tensor):
            return int(batch[name].shape[0])
    raise ValueError(f"the batch has neither input_ids nor labels (it has {sorted(batch)}), so its rows are not known")


def _has_rows(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == rows


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


def _aligned(name: str, value: Any, rows: int) -> Any:
    """Return *value* with one row per row of the batch; a single row (of positions, say) is repeated for all."""
    if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] == rows:
        return value
    if value.shape[0] == 1:
        return value.expand(rows, *value.shape[1:])
    raise ValueError(
        f"the batch's {name!r} has {value.shape[0]} rows, but input_ids {rows}; a pipeline splits a batch by rows, so "
        "every tensor needs as many"
    )


def _padded(inputs: dict[str, Any], rows: int, wanted: int) -> dict[str, Any]:
    """Append copies of the first row, with labels that are ignored, until there are *wanted* rows."""
    missing = wanted - rows
    if missing == 0:
        return inputs
    padded = {}
    for name, value in inputs.items():
        if not _has_rows(value, rows):
            padded[name] = value
            continue
        if name in _LABELS and value.is_floating_point():
            raise ValueError(
                f"the batch has {rows} rows, and filling it up to {wanted} needs labels that do not count, which float "
                "labels have none of; pass batches that divide into microbatches (drop_last=True in the DataLoader)"
            )
        more = value[:1].expand(missing, *value.shape[1:])
        if name in _LABELS:
            more = torch.full_like(more, IGNORED)
        elif name in (COUNTED, ROWS):
            more = torch.zeros_like(more)
        padded[name] = torch.cat([value, more])
    return padded
