"""Define the options of pipeline parallelism, under NeMo's names; no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import attrs

from nemo_dist.planning.validation import shown
from nemo_dist.plugin.mixed_precision import dtype_name
from nemo_dist.plugin.options import Fixed, boolean, integer, one_of, options
from nemo_dist_pipeline.schedule.schedules import named

_DTYPES = ("float32", "bfloat16", "float16", "float64")


def _schedule(instance: Any, attribute: Any, value: Any) -> None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"PipelineConfig.{attribute.name} must be a string (got {shown(value)})")


def _path(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, os.PathLike):
        raise TypeError(f"PipelineConfig.pp_schedule_csv must be a path (got {shown(value)})")
    return os.fspath(value)


def _names(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)


def _parts(value: Any) -> Any:
    if value is None:
        return None
    parts = value if isinstance(value, list | tuple) else [value]
    if parts is not value or not all(_names(part) for part in parts):
        raise TypeError(
            "module_fqns_per_model_part must be a list with a list of module names for every stage "
            f"(got {shown(value)})"
        )
    return tuple(tuple(part) for part in value)


def _function_name(value: Any) -> str:
    """Write a function without its address, so that ranks which build the same setup describe it alike."""
    return f"{value.__module__}.{value.__qualname__}" if hasattr(value, "__qualname__") else type(value).__name__


def _callable(instance: Any, attribute: Any, value: Any) -> None:
    if value is not None and not callable(value):
        raise TypeError(f"PipelineConfig.loss_fn must be a function of logits and labels (got {shown(value)})")


_PATCHES = ("patch_inner_model", "patch_causal_lm_model", "patch_stage_backward_maybe_with_nosync")
_FIXED = {name: Fixed(values=(True, False), instead="stages run the model's own forward") for name in _PATCHES}


@options(plugin="pipeline", fixed=_FIXED)
class PipelineConfig:
    """Options of pipeline parallelism, under NeMo's names.

    ``pp_schedule``: the name of a torch schedule, however it is spelled ("1f1b", "interleaved_1f1b", "zero_bubble" for
    InterleavedZeroBubble, "zbv" for ZBVZeroBubble, ...); None is "1f1b". ``pp_schedule_csv``: a file with a schedule of
    your own in its place, a line per rank. ``pp_microbatch_size``: rows in a microbatch. ``pp_batch_size``: rows that a
    data-parallel rank passes at once; smaller batches are padded with rows whose labels are ignored, larger ones are
    refused; None takes batches of any size. ``layers_per_stage``: makes as many stages as layers divided by it, rounded
    to a multiple of the ranks as ``round_virtual_stages_to_pp_multiple`` says ("up" or "down"), and divides the layers
    by count; None makes one stage per rank, two for looped and V schedules, balanced by bytes and FLOPs.
    ``module_fqns_per_model_part``: the modules of every stage by full name, in place of that. ``loss_fn``: a function
    of logits and labels that returns the mean over the labels that are not -100, as the model's own loss does; None is
    the model's own. ``dtype``: of the hidden states between stages; None is that of the first stage's output.
    ``pp_seq_len``: the length of every sequence, others are refused; None takes any. ``pp_cached_schedules``: for how
    many shapes of the inputs a schedule is kept, with its receive buffers: hidden states and gradients of all
    microbatches; another shape drops the one that was used longest ago. ``scale_grads_in_schedule``: sum gradients over
    microbatches and divide once at the end, not in the loss; the gradients come out the same.
    """

    # GPipe and LoopedBFS idle as long as the first two and hold more.
    worth_trying: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "pp_schedule": (None, "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"),
    }
    rows_option: ClassVar[str] = "pp_microbatch_size"  # says how many rows a forward takes

    pp_schedule: str | None = attrs.field(default=None, validator=_schedule)
    pp_schedule_csv: str | None = attrs.field(default=None, converter=_path)
    pp_microbatch_size: int = attrs.field(default=1, validator=integer(at_least=1))
    pp_batch_size: int | None = attrs.field(default=None, validator=attrs.validators.optional(integer(at_least=1)))
    layers_per_stage: int | None = attrs.field(default=None, validator=attrs.validators.optional(integer(at_least=1)))
    module_fqns_per_model_part: Iterable[Iterable[str]] | None = attrs.field(default=None, converter=_parts)
    round_virtual_stages_to_pp_multiple: str | None = attrs.field(
        default=None, validator=attrs.validators.optional(one_of(("up", "down")))
    )
    scale_grads_in_schedule: bool = attrs.field(default=False, validator=boolean)
    loss_fn: Callable[[Any, Any], Any] | None = attrs.field(default=None, validator=_callable, repr=_function_name)
    dtype: Any = attrs.field(default=None, converter=dtype_name, validator=attrs.validators.optional(one_of(_DTYPES)))
    pp_seq_len: int | None = attrs.field(default=None, validator=attrs.validators.optional(integer(at_least=1)))
    pp_cached_schedules: int = attrs.field(default=1, validator=integer(at_least=1))

    def __attrs_post_init__(self) -> None:
        if self.pp_schedule is not None:
            named(self.pp_schedule)

    @property
    def parts(self) -> tuple[tuple[str, ...], ...] | None:
        """``module_fqns_per_model_part`` as tuples."""
        given: Any = self.module_fqns_per_model_part
        return given  # type: ignore[no-any-return]

    @property
    def microbatches(self) -> int:
        """The microbatches that ``pp_batch_size`` makes, to which smaller batches are padded; 0 without it."""
        return (self.pp_batch_size or 0) // self.pp_microbatch_size
