"""The loss, the optimizer and the schedule of its learning rate, by the names that their packages give them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch.optim import Optimizer

from nemo_dist import losses
from nemo_dist.checkpoint.scheduler_state import take_rates
from nemo_dist.errors import UnknownNameError
from nemo_dist.models.meta_model import in_one_line
from nemo_dist.planning.validation import near, shown
from nemo_dist.recipe.config import LOSSES, LossSection, OptimizerSection, SchedulerSection
from nemo_dist.training.runtime import Runtime

_WARMUP = "num_warmup_steps"
_WORDS = {"initial_lr": "lr", "lr": "the rate of the next step"}  # of options that a schedule goes by


def make_loss(section: LossSection | None) -> Any:
    """Return the loss of the recipe, None for the model's own; raise ValueError for what are not its options."""
    if section is None:
        return None
    kind: Any = getattr(losses, LOSSES[section.type])
    _refuse_unknown("loss", section.options, [field.name for field in attrs.fields(kind) if field.type == "float"])
    for name, value in section.options.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"loss.{name} must be a number (got {shown(value)})")
    return kind(**section.options)


def optimizer_type(section: OptimizerSection) -> type[Optimizer]:
    """Return the class; raise UnknownNameError for one that torch.optim lacks, and for options that it lacks."""
    known = {
        name: kind
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer
    }
    if section.type not in known:
        raise UnknownNameError(
            f"optimizer.type {shown(section.type)} is no class of torch.optim{near(section.type, known)}; known: "
            f"{', '.join(sorted(known))}"
        )
    kind = known[section.type]
    takes = inspect.signature(kind).parameters
    _refuse_unknown("optimizer", section.options, list(takes)[1:])
    for name, value in section.options.items():
        if isinstance(takes[name].default, bool) or "bool" in str(takes[name].annotation):
            continue
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, bool) or (isinstance(one, float) and not math.isfinite(one)):
                raise ValueError(f"optimizer.{name} must be of finite numbers (got {shown(value)})")
    return kind


def make_optimizer(section: OptimizerSection, runtime: Runtime) -> Any:
    """Return the optimizer of all parameters that are trained."""
    return runtime.optimizer(optimizer_type(section), **_options(section))


def tried_optimizer(section: OptimizerSection) -> Optimizer:
    """Return an optimizer that has stepped one small parameter; raise ValueError where it does not."""
    kind, options = optimizer_type(section), _options(section)
    if "capturable" in options:  # only on a GPU
        options["capturable"] = False
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    parameter.grad = torch.ones(2, 2)
    with _tried(section):
        optimizer = kind([parameter], **options)
        optimizer.step()
    return optimizer


def _options(section: OptimizerSection) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in section.options.items()}


@contextmanager
def _tried(section: OptimizerSection | SchedulerSection) -> Iterator[None]:
    """Have whatever is raised within be a ValueError about *section*."""
    try:
        yield
    except Exception as error:  # each class checks its options in its own way, and some only as they use them
        raise ValueError(
            f"{section.name}.type '{section.type}' does not run as the section sets it ({in_one_line(error)}); change "
            "the options, or the type"
        ) from error


def _judge_schedule(section: SchedulerSection) -> None:
    """Raise ValueError for a schedule that transformers lacks, and for options or a warmup that it does not take."""
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    known: dict[str, Any] = {kind.value: make for kind, make in TYPE_TO_SCHEDULER_FUNCTION.items()}
    for name in ("reduce_lr_on_plateau", "greedy"):  # they follow a loss, and the recipe hands them none
        known.pop(name, None)
    if section.type not in known:
        raise UnknownNameError(
            f"scheduler.type {shown(section.type)} is no schedule of the recipe{near(section.type, known)}; known: "
            f"{', '.join(sorted(known))}"
        )
    takes = {name: list(inspect.signature(make).parameters) for name, make in known.items()}
    given = ("optimizer", _WARMUP, "num_training_steps", "last_epoch")
    _refuse_unknown("scheduler", section.options, [name for name in takes[section.type] if name not in given])
    if section.warmup and _WARMUP not in takes[section.type]:
        others = ", ".join(sorted(name for name in takes if _WARMUP in takes[name]))
        raise ValueError(
            f"scheduler.warmup is {section.warmup}, but the schedule '{section.type}' has none; set scheduler.type to "
            f"one that has: {others}"
        )


def make_schedule(section: SchedulerSection, optimizer: Any, steps: int) -> Any:
    """Return the scheduler for a run of so many *steps*; raise ValueError where it has no rate for one of them."""
    from transformers import get_scheduler

    _judge_schedule(section)
    with _tried(section):
        schedule: Any = get_scheduler(section.type, optimizer, section.warmup, steps, dict(section.options) or None)
        for step in (*range(0, steps, 1 + steps // 100), steps):
            for factor in schedule.lr_lambdas:
                factor(step)
    return schedule


def options_of(optimizer: Any) -> list[dict[str, Any]]:
    """Return the options of each parameter group of *optimizer*, as the recipe gives them."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def give_back(options: Sequence[Mapping[str, Any]], optimizer: Any, schedule: Any) -> list[str]:
    """Give *optimizer* its *options* of before a checkpoint was loaded, and the rate that *schedule* has for the step.

    A checkpoint brings those that it was saved with. Returns what is another than in the checkpoint, in words.
    """
    changed: dict[str, None] = {}
    for group, own, factor in zip(optimizer.param_groups, options, schedule.lr_lambdas, strict=True):
        rate = own["initial_lr"] * factor(schedule.last_epoch)
        for name, value in {**own, "lr": rate}.items():
            if name in group and group[name] != value:
                changed[f"{_WORDS.get(name, name)} {shown(value)} (it was {shown(group[name])})"] = None
            group[name] = value
    take_rates(schedule, {})
    return list(changed)


def _refuse_unknown(where: str, options: Iterable[str], valid: list[str]) -> None:
    unknown = [f"{where} has an unknown key {shown(name)}{near(name, valid)}" for name in options if name not in valid]
    if unknown:
        raise UnknownNameError("; ".join(unknown) + f"; valid keys: {', '.join(valid)}")
