"""The sections of a recipe: plain values, checked all at once, without torch and before a rank starts."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

import attrs

from nemo_dist.errors import TopologyError, UnknownNameError
from nemo_dist.planning.validation import LARGEST_SEED, integer, near, shown
from nemo_dist.setup.setup import DistributedSetup
from nemo_dist.setup.yaml_section import read_recipe, read_texts, read_value

ANSWERS, ALL = "answers", "all"
DPO = "dpo"
LOSSES = {"cross_entropy": "CrossEntropy", DPO: "DPO"}  # the classes in nemo_dist.losses
_AUTO, _STORED = "auto", "float32"  # _STORED: the dtype of parameters unless a recipe says another
_DTYPES = ("float32", "bfloat16", "float16", "float64")


def _judge(kinds: tuple[type, ...], words: str) -> Any:
    """Return a validator for values of *kinds*, in *words*; a bool is no number."""

    def judge(section: Any, field: attrs.Attribute[Any], value: Any) -> None:
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise TypeError(f"{section.name}.{field.name} must be {words} (got {shown(value)})")

    return judge


def _whole(low: int, high: int | None = None) -> Any:
    def judge(section: Any, field: attrs.Attribute[Any], value: Any) -> None:
        integer(f"{section.name}.{field.name}", value, low, high)

    return judge


_optional = attrs.validators.optional
_text = _judge((str,), "text")
_switch = _judge((bool,), "true or false")
_mapping = _judge((Mapping,), "a mapping")


def _positive(section: Any, field: attrs.Attribute[Any], value: Any) -> None:
    _judge((int, float), "a number")(section, field, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{section.name}.{field.name} must be finite and above 0 (got {shown(value)})")


def _date(section: Any, field: attrs.Attribute[Any], value: Any) -> None:
    _text(section, field, value)
    try:
        datetime.fromisoformat(value)
    except ValueError:
        raise ValueError(f"{section.name}.{field.name} must be a date, as 2024-07-26 (got {shown(value)})") from None


def _field(default: Any, validator: Any) -> Any:
    return attrs.field(default=default, validator=_optional(validator) if default is None else validator)


@attrs.frozen(kw_only=True)
class ModelSection:
    """Which causal language model: the ``path`` of a folder or its name on the hub, or the ``config`` of a new one.

    ``dtype`` is that of the stored parameters, "auto" the one of the files at ``path``. ``tokenizer``: a folder or name
    on the hub, by default ``path``, or "bytes" for a token per byte.
    ``peft``: the fields of a config of PEFT, with ``peft_type``, to train adapters. ``options`` go to the loader.
    """

    name: ClassVar[str] = "model"

    path: str | None = _field(None, _text)
    config: Mapping[str, Any] | None = _field(None, _mapping)
    dtype: str = _field(_STORED, _text)
    attn_implementation: str | None = _field(None, _text)
    tokenizer: str | None = _field(None, _text)
    peft: Mapping[str, Any] | None = _field(None, _mapping)
    options: Mapping[str, Any] = attrs.field(factory=dict, validator=_mapping)

    def __attrs_post_init__(self) -> None:
        if (self.path is None) == (self.config is None):
            raise ValueError("model needs one of path (a folder, or a name on the hub) and config (of a new model)")
        _refuse_dtype(self.dtype, (*_DTYPES, _AUTO) if self.config is None else _DTYPES)
        for name in {"dtype", "torch_dtype"} & self.options.keys():
            raise ValueError(f"model.options has {name}, whose place is model.dtype; move it there")
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError("model.config needs a model_type, 'llama' for one")
        if self.config is not None and self.tokenizer is None:
            raise ValueError("model.tokenizer must be given with model.config: a folder, a name on the hub, or 'bytes'")


def _refuse_dtype(dtype: Any, known: Sequence[str]) -> None:
    if dtype not in known:
        hint = near(dtype, known)
        raise ValueError(f"model.dtype must be one of {', '.join(known)} (got {shown(dtype)}){hint}")


def stored_dtype(path: str | os.PathLike[str]) -> str | None:
    """Return the dtype of parameters that the recipe at *path* asks for.

    None is that of the model's files: for "auto", and for a file whose ``model`` is not as in a recipe.
    """
    found = read_texts(path, ModelSection.name)
    if not {"path", "config"} & found.keys() or "_target_" in found:  # of another program
        return None
    dtype = found.get("dtype", _STORED)
    _refuse_dtype(dtype, (*_DTYPES, _AUTO))
    return None if dtype == _AUTO else dtype


@attrs.frozen(kw_only=True)
class DataSection:
    """What to train on: the ``path`` of a text file, of JSON lines, or of a folder of them or of ``datasets``.

    Rows have at most ``length`` tokens. ``packing``: several documents in one row, kept apart. ``text``: the field of a
    JSON line that is text. ``train_on``: "answers" counts the labels of an assistant's turns and of completions alone,
    "all" those of every token. ``chat_template``: a file, by default the tokenizer's own. ``date``: what a template
    that asks for that of today gets.
    """

    name: ClassVar[str] = "data"

    path: str = attrs.field(validator=_text)
    length: int = _field(1024, _whole(2))
    packing: bool = _field(False, _switch)
    shuffle: bool = _field(True, _switch)
    text: str = _field("text", _text)
    train_on: str = _field(ANSWERS, _text)
    chat_template: str | None = _field(None, _text)
    date: str | None = _field(None, _date)

    def __attrs_post_init__(self) -> None:
        if self.train_on not in (ANSWERS, ALL):
            hint = near(self.train_on, (ANSWERS, ALL))
            raise ValueError(f"data.train_on must be '{ANSWERS}' or '{ALL}' (got {shown(self.train_on)}){hint}")


@attrs.frozen(kw_only=True)
class LossSection:
    """The ``type``, "cross_entropy" or "dpo" of ``nemo_dist.losses``, and its ``options``: every further key.

    For "dpo" the data are preferences, and the reference is the model as it is loaded, before the first step.
    """

    name: ClassVar[str] = "loss"
    rest: ClassVar[str] = "options"

    type: str = attrs.field(validator=_text)
    options: Mapping[str, Any] = attrs.field(factory=dict, validator=_mapping)

    def __attrs_post_init__(self) -> None:
        if self.type not in LOSSES:
            hint = near(self.type, LOSSES)
            raise ValueError(f"loss.type must be one of {', '.join(LOSSES)} (got {shown(self.type)}){hint}")


@attrs.frozen(kw_only=True)
class OptimizerSection:
    """The ``type``, a class of torch.optim, and its ``options``: every further key of the section."""

    name: ClassVar[str] = "optimizer"
    rest: ClassVar[str] = "options"

    type: str = _field("AdamW", _text)
    options: Mapping[str, Any] = attrs.field(factory=dict, validator=_mapping)


@attrs.frozen(kw_only=True)
class SchedulerSection:
    """The ``type``, a name of transformers' schedules, its ``warmup`` in steps, and ``options``: every further key."""

    name: ClassVar[str] = "scheduler"
    rest: ClassVar[str] = "options"

    type: str = _field("constant", _text)
    warmup: int = _field(0, _whole(0))
    options: Mapping[str, Any] = attrs.field(factory=dict, validator=_mapping)


@attrs.frozen(kw_only=True)
class TrainingSection:
    """How long and in what steps: ``steps`` or ``epochs`` of ``batch_size`` rows over all ranks.

    A rank computes its rows of a step in ``accumulation`` batches. ``clip``: the largest norm of the gradients; null
    clips nothing.
    """

    name: ClassVar[str] = "training"

    steps: int | None = _field(None, _whole(1))
    epochs: float | None = _field(None, _positive)
    batch_size: int = attrs.field(validator=_whole(1))
    accumulation: int = _field(1, _whole(1))
    clip: float | None = _field(1.0, _optional(_positive))
    seed: int = _field(0, _whole(0, LARGEST_SEED))

    def __attrs_post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("training needs one of steps and epochs")


@attrs.frozen(kw_only=True)
class CheckpointSection:
    """Where the run is saved, and resumed from by itself: see :class:`nemo_dist.RunFolder`.

    ``every``: steps between checkpoints, beside that of the last step. ``export``: a folder for the trained model as
    transformers reads it. ``grace_seconds``: how long a save may take after SIGTERM.
    """

    name: ClassVar[str] = "checkpoint"

    folder: str | None = _field(None, _text)
    every: int | None = _field(None, _whole(1))
    keep_last: int | None = _field(None, _whole(1))
    keep_every: int | None = _field(None, _whole(1))
    asynchronous: bool = _field(False, _switch)
    resume: bool = _field(True, _switch)
    export: str | None = _field(None, _text)
    grace_seconds: int = _field(300, _whole(1))

    def __attrs_post_init__(self) -> None:
        if self.folder is None and any((self.every, self.keep_last, self.keep_every)):
            raise ValueError("checkpoint.folder must be given where checkpoints are asked for")


@attrs.frozen(kw_only=True)
class EvaluateSection:
    """What the loss is computed on beside training: a ``path`` like that of ``data``, ``every`` so many steps.

    ``rows``: at most this many of its rows. The other fields are those of ``data``.
    """

    name: ClassVar[str] = "evaluate"

    path: str = attrs.field(validator=_text)
    every: int | None = _field(None, _whole(1))
    rows: int | None = _field(None, _whole(1))


@attrs.frozen(kw_only=True)
class LoggingSection:
    """Where numbers go: always to ``metrics.jsonl`` in ``folder``, by default that of checkpoints.

    ``every``: steps between printed lines. ``tensorboard``: also for TensorBoard, in that folder. ``wandb``: the
    keywords of ``wandb.init``.
    """

    name: ClassVar[str] = "logging"

    every: int = _field(10, _whole(1))
    folder: str | None = _field(None, _text)
    tensorboard: bool = _field(False, _switch)
    wandb: Mapping[str, Any] | None = _field(None, _mapping)


_SECTIONS: dict[str, type[Any]] = {
    section.name: section
    for section in (
        *(ModelSection, DataSection, OptimizerSection, SchedulerSection, TrainingSection, CheckpointSection),
        *(EvaluateSection, LoggingSection, LossSection),
    )
}
_NEEDED = ("model", "data", "training")


@attrs.frozen(kw_only=True)
class Recipe:
    """The sections of a recipe; ``given`` is the mapping of plain values that it was made from."""

    model: ModelSection
    data: DataSection
    training: TrainingSection
    optimizer: OptimizerSection = attrs.field(factory=OptimizerSection)
    scheduler: SchedulerSection = attrs.field(factory=SchedulerSection)
    checkpoint: CheckpointSection = attrs.field(factory=CheckpointSection)
    evaluate: EvaluateSection | None = None
    loss: LossSection | None = None
    logging: LoggingSection = attrs.field(factory=LoggingSection)
    distributed: Mapping[str, Any] = attrs.field(factory=dict)
    given: Mapping[str, Any] = attrs.field(factory=dict, eq=False, repr=False)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], changes: Iterable[str] = ()) -> Recipe:
        """Return the recipe of the YAML file at *path*, with *changes* such as ``training.steps=10``.

        Raises ValueError for a file that is no recipe, and what ``from_dict`` raises.
        """
        sections = read_recipe(path)
        for change in changes:
            _change(sections, change)
        return cls.from_dict(sections)

    @classmethod
    def from_dict(cls, sections: Mapping[str, Any]) -> Recipe:
        """Return the recipe of *sections*; raise one ValueError that lists every problem.

        UnknownNameError, which is one, where a key is unknown: with the near match of each.
        """
        unknown = [_unknown("the recipe", key, (*_SECTIONS, "distributed")) for key in sections if not _known(key)]
        problems = [f"the recipe needs a section {name!r}" for name in _NEEDED if sections.get(name) is None]
        made: dict[str, Any] = {}
        for name, section in _SECTIONS.items():
            values = sections.get(name)
            if values is None:
                continue
            if not isinstance(values, Mapping):
                problems.append(f"{name} must be a mapping (got {shown(values)})")
                continue
            values = _gathered(section, values)
            keys = [field.name for field in attrs.fields(section)]
            unknown += [_unknown(name, key, keys) for key in values if key not in keys]
            try:
                made[name] = section(**{key: value for key, value in values.items() if key in keys})
            except (TypeError, ValueError) as error:
                problems.append(_in_words(name, error))
        if unknown:
            raise UnknownNameError("\n".join([*unknown, *problems]))
        if problems:
            raise TopologyError(problems)
        given = sections.get("distributed")
        recipe = cls(**made, distributed={} if given is None else given, given=dict(sections))
        recipe.refuse_broken_pairs()
        return recipe

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Return the recipe that ``to_json`` wrote."""
        return cls.from_dict(json.loads(text))

    def to_json(self) -> str:
        """Return the sections as they were given, as one line of JSON."""
        return json.dumps(self.given)

    def setup(self, world_size: int | None = None) -> DistributedSetup:
        """Return the setup of the ``distributed:`` section; raise TopologyError where rows do not divide over it."""
        setup = DistributedSetup.from_dict(self.distributed, world_size)
        self.rows_of_batch(setup)
        return setup

    @property
    def pairs(self) -> bool:
        """Whether the rows are pairs, of which a loss compares the two."""
        return self.loss is not None and self.loss.type == DPO

    def refuse_broken_pairs(self) -> None:
        """Raise TopologyError where the loss compares the rows of a pair, and a section would tear pairs apart."""
        problems = []
        if self.pairs and self.data.packing:
            problems.append("data.packing puts rows together that loss.type 'dpo' compares; leave it out")
        if self.pairs and self.evaluate is not None and (self.evaluate.rows or 0) % 2:
            problems.append(f"evaluate.rows must be even, as loss.type 'dpo' takes pairs (got {self.evaluate.rows})")
        if self.pairs and self._exports_over_its_model():
            problems.append(
                f"checkpoint.export is model.path, {self.model.path}, whose model is the reference of loss.type 'dpo' "
                "whenever the run is started; export to another folder"
            )
        if problems:
            raise TopologyError(problems)

    def _exports_over_its_model(self) -> bool:
        asked, out = self.model.path, self.checkpoint.export
        if asked is None or out is None:
            return False
        inner = self.model.options.get("subfolder")
        held = [Path(asked).expanduser(), *([Path(asked, inner).expanduser()] if isinstance(inner, str) else [])]
        return Path(out).expanduser().resolve() in [folder.resolve() for folder in held]

    def rows_of_batch(self, setup: DistributedSetup) -> int:
        """Return the rows of one batch of one data-parallel rank."""
        ranks, batches, rows = setup.plan.size("dp"), self.training.accumulation, self.training.batch_size
        together = 2 if self.pairs else 1
        if rows % (ranks * batches * together):
            in_pairs = " in pairs" if self.pairs else ""
            raise TopologyError(
                [
                    f"training.batch_size is {rows} rows, which {ranks} data-parallel ranks with accumulation "
                    f"{batches} cannot share equally{in_pairs}; make it a multiple of {ranks * batches * together}"
                ]
            )
        return rows // (ranks * batches)

    @property
    def folder(self) -> Path:
        """The folder of the metrics."""
        return Path(self.logging.folder or self.checkpoint.folder or "nemo_dist_run").expanduser()

    @property
    def evaluation_data(self) -> DataSection | None:
        """The ``data`` section of the evaluation: that of training, at another path, and in order."""
        if self.evaluate is None:
            return None
        return attrs.evolve(self.data, path=self.evaluate.path, shuffle=False)


def _known(key: str) -> bool:
    return key in _SECTIONS or key == "distributed"


def _unknown(where: str, key: str, valid: Iterable[str]) -> str:
    listed = ", ".join(valid)
    return f"{where} has an unknown key {shown(key)}{near(key, listed.split(', '))}; valid keys: {listed}"


def _gathered(section: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return *values* with what is no field of a section with options as one of those."""
    rest = getattr(section, "rest", None)
    if rest is None or rest in values:
        return dict(values)
    known = [field.name for field in attrs.fields(section)]
    return {
        **{key: value for key, value in values.items() if key in known},
        rest: {key: value for key, value in values.items() if key not in known},
    }


def _in_words(section: str, error: Exception) -> str:
    """Return *error* as a sentence: Python's own for an argument that is missing names no section."""
    missing = re.findall(r"'([a-z_]+)'", str(error)) if "missing" in str(error) else []
    return f"{section} needs {' and '.join(missing)}" if missing else str(error)


def _change(sections: dict[str, Any], change: str) -> None:
    """Set what *change* says, ``section.key=value`` with the value in YAML, in *sections*."""
    path, sign, text = change.partition("=")
    *outer, key = path.strip().split(".")
    if not sign or not key:
        raise ValueError(f"a change is section.key=value (got {shown(change)})")
    value = read_value(text, f"the value of {shown(change)}")
    within: Any = sections
    for name in outer:
        if within.get(name) is None:  # missing, or without keys of its own
            within[name] = {}
        within = within[name]
        if not isinstance(within, dict):
            raise ValueError(f"{shown(change)} goes into {shown(name)}, which is no section")
    within[key] = value
