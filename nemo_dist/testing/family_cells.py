"""One cell of the matrix of families: a tiny model of a family trained under one setup, compared with one process.

Runs on the ranks of a pool. ``prepare`` writes a checkpoint, and what plain transformers makes of it on one process,
into a folder; ``judge`` trains the checkpoint under the setup of a cell and says how the result compares.
"""

from __future__ import annotations

import hashlib
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import attrs
import torch
import transformers
from torch import Tensor, nn

import nemo_dist
from nemo_dist.errors import NemoDistError
from nemo_dist.hf_model import compute_experts_one_by_one
from nemo_dist.setup.setup import DistributedSetup
from nemo_dist.testing.equivalence import TOLERANCE, Outcome, Task, differences, tensor_differences, train_with
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.shrink import tiny

LOADERS: Final[Mapping[str, str]] = {
    "causal": "CausalLM",
    "sequence": "SequenceClassification",
    "token": "TokenClassification",
    "image-text": "ImageTextToText",
}
_ROWS, _LENGTH, _STEPS = 4, 24, 2
_LABELS = 3
_REFUSALS = (NemoDistError, ValueError, TypeError, NotImplementedError)
_ROUNDING = 4.0  # how much further than plain bfloat16 the compute in bfloat16 may be from float32
_HALF = 2.0**-8  # the relative rounding of one bfloat16


def _fsdp2(**more: Any) -> dict[str, Any]:
    return {"strategy": nemo_dist.FSDP2Config(mp_policy=dict(FP32), **more)}


def _size(**sizes: int) -> dict[str, Any]:
    return {"parallelism_sizes": nemo_dist.ParallelismSizes(**sizes)}


# What ``DistributedSetup.build`` gets in each cell, on two ranks.
CELLS: Final[Mapping[str, Callable[[], dict[str, Any]]]] = {
    "fsdp2": _fsdp2,
    "recompute": lambda: _fsdp2() | {"activation_checkpointing": True},
    "bfloat16": lambda: {"strategy": nemo_dist.FSDP2Config()},
    "ddp": lambda: {"strategy": nemo_dist.DDPConfig()},
    "tp": lambda: _fsdp2() | _size(tp_size=2),
    "tp + sp": lambda: _fsdp2(sequence_parallel=True) | _size(tp_size=2),
    "cp": lambda: _fsdp2() | _size(cp_size=2),
    "pp": lambda: _fsdp2() | _size(pp_size=2),
    "ep": lambda: _fsdp2() | _size(ep_size=2),
}
DEFAULT_PRECISION: Final = "bfloat16"


@attrs.frozen(kw_only=True)
class Verdict:
    """What became of a cell: ``equal``, ``refused``, or a failure (``wrong``, ``crash``, ``late refusal``); and why."""

    status: str
    reason: str = ""
    digests: Mapping[str, str] = attrs.field(factory=dict)  # of what this rank has, by name
    expected: frozenset[str] = frozenset()  # the names of what all ranks together must have


@attrs.frozen(kw_only=True)
class FamilyTask(Task):
    """Training of a tiny model of one family on rows of different lengths."""

    kind: str
    pad: int = 0
    eos: int = 2
    masked: bool = True
    steps: int = _STEPS

    def batches(self, step: int) -> list[dict[str, Tensor]]:
        """Return the global batch of *step*: padded rows, with labels of which each row masks another share."""
        generator = torch.Generator().manual_seed(100 + step)
        tokens = torch.randint(10, 90, (_ROWS, _LENGTH), generator=generator)
        lengths = torch.tensor([_LENGTH, _LENGTH - 4, _LENGTH - 9, _LENGTH]).unsqueeze(1)
        mask = torch.arange(_LENGTH) < (lengths if self.masked else _LENGTH)
        counted = torch.rand(tokens.shape, generator=generator) < torch.tensor([[0.3], [0.9], [0.6], [0.8]])
        rows = {"input_ids": tokens.where(mask, self.pad)}
        if self.masked:
            rows["attention_mask"] = mask.long()
        if self.kind == "sequence":
            last = mask.sum(dim=1, keepdim=True) - 1  # encoder-decoders classify at the end-of-sequence token
            rows["input_ids"] = rows["input_ids"].scatter(1, last, self.eos)
            return [rows | {"labels": torch.randint(0, _LABELS, (_ROWS,), generator=generator)}]
        tags = torch.randint(0, _LABELS, tokens.shape, generator=generator) if self.kind == "token" else tokens
        return [rows | {"labels": tags.where(mask & counted, -100)}]


def prepare(family: str, kind: str, folder: Path) -> str:
    """Write checkpoint and reference of *family* into *folder*; return why that cannot be, or an empty string."""
    _be_quiet()
    try:
        config, task = _config(family, kind)
        model = _new_model(config, kind)
        model.save_pretrained(folder / "model")
        if lost := _lost(model, _plain(task, folder / "model", torch.float32)):
            return f"plain transformers: does not load what it saved, {lost[0]} and {len(lost) - 1} more"
        task = _with_a_mask_where_it_fits(task, folder)
        torch.save({"task": task, "exact": _reference(task, folder)}, folder / "reference.pt")
    except Exception as error:
        return f"plain transformers: {_line(error)}"
    try:
        torch.save(_reference(task, folder, torch.bfloat16), folder / "bfloat16.pt")
    except Exception as error:
        torch.save(f"plain transformers in bfloat16: {_line(error)}", folder / "bfloat16.pt")
    return ""


def judge(cell: str, folder: Path) -> Verdict:
    """Return the verdict of *cell* on the model in *folder*; called on both ranks, which may disagree."""
    _be_quiet()
    known = torch.load(folder / "reference.pt", weights_only=False)
    half = torch.load(folder / "bfloat16.pt", weights_only=False) if cell == DEFAULT_PRECISION else None
    if isinstance(half, str):
        return Verdict(status="no reference", reason=half)
    task: FamilyTask = known["task"]
    stage = "load"
    try:
        setup = DistributedSetup.build(**CELLS[cell]())
        model = loader(task.kind).from_pretrained(folder / "model", distributed_setup=setup, dtype=torch.float32)
        runtime = setup.runtime(model)
        stage = "step"
        found = train_with(task, runtime)
        stage = "export"
        runtime.export(folder / f"export-{cell}")
        saved = _saved(folder / f"export-{cell}", task) if torch.distributed.get_rank() == 0 else None
    except Exception as error:
        return _failure(error, stage)
    exact, plain_saved = known["exact"]
    names = frozenset((*(f"gradient of {name}" for name in exact.gradients), *exact.parameters))
    found, exact = _without_zeros(found, exact), _held_here(exact, found)
    if half is not None:
        lines = _rounded(found, exact, half[0])
    else:
        lines = _differences(found, exact, (saved, plain_saved) if saved is not None else ({}, {}), task, folder)
    digests = {name: _digest(tensor) for name, tensor in found.parameters.items()}
    digests |= {f"gradient of {name}": _digest(tensor) for name, tensor in found.gradients.items()}
    digests["losses and norms"] = str([*found.losses, *found.norms])
    status = "wrong" if lines else "equal"
    return Verdict(status=status, reason="; ".join(lines[:3])[:400], digests=digests, expected=names)


def _differences(
    found: Outcome,
    exact: Outcome,
    files: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    task: FamilyTask,
    folder: Path,
) -> list[str]:
    """Return where *found*, or the first of *files*, is further from one process than rounding brings it.

    What runs in float64, and from weights that are moved by one rounding, say of it is asked only where the two differ.
    """
    lines = differences(found, exact) + tensor_differences("export", *files, TOLERANCE)
    for how in ({"dtype": torch.float64}, {"moved": True}):
        if not lines:
            break
        try:
            other, _ = _alone(task, folder, **how)
        except (RuntimeError, NotImplementedError):  # a kernel without float64
            continue
        unexplained = differences(found, exact, other=_held_here(other, found))
        unexplained += tensor_differences("export", *files, TOLERANCE, other.parameters)
        lines = [line for line in lines if line in unexplained]
    return lines


def merged(verdicts: list[Verdict]) -> Verdict:
    """Return the verdict of all ranks: the first failure, or that replicas differ."""
    order = ("crash", "late refusal", "wrong", "refused", "no reference", "equal")
    worst = min(verdicts, key=lambda verdict: order.index(verdict.status))
    if worst.status != "equal":
        return Verdict(status=worst.status, reason=worst.reason)
    if absent := sorted(verdicts[0].expected.difference(*(verdict.digests for verdict in verdicts))):
        return Verdict(status="wrong", reason=f"no rank has {', '.join(absent[:3])}")
    first = verdicts[0].digests
    unlike = [
        name for other in verdicts[1:] for name in first.keys() & other.digests if first[name] != other.digests[name]
    ]
    if unlike:
        return Verdict(status="wrong", reason=f"differs between ranks: {', '.join(sorted(unlike)[:3])}")
    return Verdict(status="equal")


def _be_quiet() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def loader(kind: str) -> Any:
    """Return the ``NeMoAutoModelFor*`` class of *kind*."""
    return getattr(nemo_dist, f"NeMoAutoModelFor{LOADERS[kind]}")


def _config(family: str, kind: str) -> tuple[Any, FamilyTask]:
    config = tiny(family).config
    text = config.get_text_config()
    if kind in ("sequence", "token"):
        for one in (config, text):
            one.num_labels = _LABELS
            one.classifier_dropout = 0.0  # of many heads it is 0.1, without an option in the config
            one.pad_token_id = one.pad_token_id if getattr(one, "pad_token_id", None) is not None else 0
    eos = getattr(text, "eos_token_id", None)
    eos = eos[0] if isinstance(eos, (list, tuple)) else eos
    pad = getattr(text, "pad_token_id", None)
    return config, FamilyTask(
        kind=kind, pad=pad if isinstance(pad, int) and pad >= 0 else 0, eos=2 if eos is None else eos
    )


def _new_model(config: Any, kind: str) -> Any:
    """Return a model whose every parameter matters: weights wide enough for their inputs, noise on biases and norms."""
    torch.manual_seed(0)
    model = loader(kind).from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            if not parameter.any():
                parameter.normal_(std=0.1)
            elif parameter.ndim < 2 or parameter.min() == parameter.max():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            elif parameter.std() < 0.05:
                parameter.mul_(parameter.shape[-1] ** -0.5 / parameter.std())
    return model


def _plain(task: FamilyTask, folder: Path, dtype: torch.dtype) -> Any:
    return getattr(transformers, f"AutoModelFor{LOADERS[task.kind]}").from_pretrained(folder, dtype=dtype)


def _lost(saved: nn.Module, loaded: nn.Module) -> list[str]:
    """Return the parameters of *saved* that *loaded* has otherwise, or that only it has: those that it drew anew."""
    kept, found = (dict(model.named_parameters(remove_duplicate=False)) for model in (saved, loaded))
    changed = [name for name, one in kept.items() if name not in found or not torch.equal(found[name], one)]
    return [*changed, *(name for name in found if name not in kept)]


def _with_a_mask_where_it_fits(task: FamilyTask, folder: Path) -> FamilyTask:
    """Return *task*, or the same with full rows where plain transformers takes no mask."""
    try:
        _plain(task, folder / "model", torch.float32)(**task.batches(0)[0])
    except Exception:
        return attrs.evolve(task, masked=False)
    return task


def _reference(task: FamilyTask, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Outcome, dict[str, Tensor]]:
    """Return what one process computes in *dtype*, and what it saves."""
    outcome, model = _alone(task, folder, dtype)
    model.save_pretrained(folder / "saved")
    return outcome, _saved(folder / "saved", task)


def _alone(
    task: FamilyTask, folder: Path, dtype: torch.dtype = torch.float32, moved: bool = False
) -> tuple[Outcome, Any]:
    """Return what one process computes in *dtype*, with optimizer and weights in float32 at least, and the model.

    *moved*: from weights each of which is the next number above or below, at random.
    """
    model = _plain(task, folder / "model", dtype)
    if moved:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                away = torch.where(torch.rand(parameter.shape, generator=generator) < 0.5, -torch.inf, torch.inf)
                parameter.copy_(torch.nextafter(parameter, away.to(parameter.dtype)))
    if dtype is torch.float64:
        compute_experts_one_by_one(model)
    wide = torch.promote_types(dtype, torch.float32)
    masters = {name: nn.Parameter(parameter.detach().to(wide)) for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(masters.values(), **task.optimizer)
    losses, norms, gradients = [], [], {}
    for step in range(task.steps):
        loss = model(**task.batches(step)[0]).loss
        loss.backward()
        for name, parameter in model.named_parameters():
            masters[name].grad = None if parameter.grad is None else parameter.grad.to(wide)
        if step == 0:
            gradients = {n: p.grad.clone() for n, p in masters.items() if p.grad is not None}
        norms.append(torch.nn.utils.clip_grad_norm_(masters.values(), 0.5).item())
        optimizer.step()
        model.zero_grad()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(masters[name])
        losses.append(loss.item())
    if not all(map(_finite, losses)):
        raise FloatingPointError(f"the loss is {losses}")
    parameters = {name: master.detach() for name, master in masters.items()}
    return Outcome(losses=losses, norms=norms, gradients=gradients, parameters=parameters), model


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")


def _saved(folder: Path, task: FamilyTask) -> dict[str, Tensor]:
    return {name: one.detach().clone() for name, one in _plain(task, folder, torch.float32).named_parameters()}


def _without_zeros(found: Outcome, exact: Outcome) -> Outcome:
    """Leave out gradients of zero where one process has none: of modules that no token reached."""
    kept = {n: g for n, g in found.gradients.items() if n in exact.gradients or g.any()}
    return attrs.evolve(found, gradients=kept)


def _held_here(exact: Outcome, found: Outcome) -> Outcome:
    """Leave out what this rank does not have, of *exact*: the parameters of other pipeline stages."""
    return attrs.evolve(
        exact,
        gradients={name: one for name, one in exact.gradients.items() if name in found.gradients},
        parameters={name: one for name, one in exact.parameters.items() if name in found.parameters},
    )


def _rounded(found: Outcome, exact: Outcome, half: Outcome) -> list[str]:
    """Return where *found*, computed in bfloat16, is further from *exact* than rounding can bring it.

    Plain bfloat16, *half*, says how far that is: for each gradient, and at least as far as for all of them together.
    """
    if extra := found.gradients.keys() - exact.gradients.keys():
        return [f"gradients: unexpected {sorted(extra)[:3]}"]
    lines = []
    whole = _error(half.gradients, exact.gradients, list(exact.gradients))
    for name in exact.gradients:
        bound = _ROUNDING * max(_error(half.gradients, exact.gradients, [name]), whole, _HALF)
        error = _error(found.gradients, exact.gradients, [name])
        if not error <= bound:
            lines.append(f"gradients: {name} is off by {error:.1e}, plain bfloat16 by {bound / _ROUNDING:.1e}")
    for step, (a, b, c) in enumerate(zip(found.losses, exact.losses, half.losses, strict=True)):
        # A loss after a step is as good as the gradients of that step, however close plain bfloat16 came by chance.
        if not abs(a - b) <= _ROUNDING * max(abs(c - b), (max(whole, _HALF) if step else _HALF) * abs(b)):
            lines.append(f"losses[{step}]: {a:.5f}, in float32 {b:.5f}, in plain bfloat16 {c:.5f}")
    return lines


def _error(found: Mapping[str, Tensor], exact: Mapping[str, Tensor], names: list[str]) -> float:
    """Return the norm of the difference of all *names* together, relative to their norm or the largest tensor's."""
    off = sum((found[name].double() - exact[name].double()).square().sum().item() for name in names) ** 0.5
    size = sum(exact[name].double().square().sum().item() for name in names) ** 0.5
    floor = max(gradient.double().norm().item() for gradient in exact.values()) * 1e-2
    return float(off / max(size, floor, 1e-30))


def _failure(error: Exception, stage: str) -> Verdict:
    """Return the verdict of an error: refused in our own words, before a step or too late, or a crash in raw ones."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = bool(frames) and "/nemo_dist" in frames[-1].filename and (frames[-1].line or "").startswith("raise")
    if isinstance(error, _REFUSALS) and ours:
        return Verdict(status="refused" if stage == "load" else "late refusal", reason=_line(error))
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return Verdict(status="crash", reason=f"in {stage}, {place}: {type(error).__name__}: {_line(error)}")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__


def _digest(tensor: Tensor) -> str:
    return hashlib.sha1(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:8]
