"""Turn the batches of a step into runs of the schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
from torch import Tensor, nn

from nemo_dist.plugin.hookspecs import Batch
from nemo_dist_pipeline.runtime.microbatches import Microbatches
from nemo_dist_pipeline.schedule.stage_placement import Placement

if TYPE_CHECKING:
    from nemo_dist_pipeline.config import PipelineConfig


@attrs.frozen(kw_only=True)
class Feed:
    """What *config* and *placement* make of a batch; ``hidden`` is the width of the hidden states."""

    config: PipelineConfig
    placement: Placement
    cp_size: int
    hidden: int

    @property
    def least(self) -> int:
        """The microbatches that a batch is filled up to."""
        return self.placement.microbatches or self.config.microbatches

    def run(self, model: nn.Module, batch: Batch, weight: Tensor) -> Microbatches:
        """Return the microbatches of *batch*; raise ValueError where it does not fit the schedule."""
        run = Microbatches.of(model, batch, weight, self.config.pp_microbatch_size, self.least)
        length = self.hidden_shape(run)[1] * self.cp_size
        if self.config.pp_seq_len not in (None, length):
            raise ValueError(
                f"the batch has sequences of {length} tokens, but pp_seq_len is {self.config.pp_seq_len}; pad it "
                "to that, or leave pp_seq_len out"
            )
        if self.least and run.count > self.least:
            limit = self.least * self.config.pp_microbatch_size
            what = "pp_schedule_csv" if self.placement.microbatches else "pp_batch_size"
            raise ValueError(
                f"the batch has {run.count} microbatches of {self.config.pp_microbatch_size} rows, but {what} is for "
                f"{self.least} ({limit} rows); pass smaller batches, or a list of them"
            )
        if problem := self.placement.microbatch_problem(run.count):
            raise ValueError(
                f"{problem}; the batch was split by pp_microbatch_size={self.config.pp_microbatch_size}. Pass larger "
                "batches, or set pp_batch_size: smaller ones are then filled up with rows that do not count"
            )
        return run

    def joined(self, runs: list[Microbatches]) -> list[Microbatches]:
        """Return *runs* as one where they fit together: one fill and drain of the pipeline instead of several."""
        together = (
            len(runs) > 1
            and self.placement.joins
            and len({run.shape for run in runs}) == 1
            and not self.placement.microbatch_problem(sum(run.count for run in runs))
        )
        return [Microbatches.joined(runs)] if together else runs

    def hidden_shape(self, run: Microbatches) -> tuple[int, int, int]:
        """Return the shape of what travels between stages for a microbatch: (rows, length, width)."""
        source = run.inputs.get("input_ids", run.inputs.get("inputs_embeds"))
        if source is None:
            raise ValueError(f"the batch has neither input_ids nor inputs_embeds (it has {sorted(run.inputs)})")
        return run.rows // run.count, source.shape[1], self.hidden
