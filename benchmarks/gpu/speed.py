"""A step of a Llama of 1.1 billion parameters against hand-written FSDP2 and transformers' Trainer, and its files."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from handwritten import shard
from record import Place, Record
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_dist import DistributedSetup, NeMoAutoModelForCausalLM

_WARM_UP = 3


def _config(place: Place) -> LlamaConfig:
    if not place.cuda:
        return LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=256
        )
    return LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=4096, use_cache=False, tie_word_embeddings=False,
    )  # fmt: skip


def _shape(place: Place) -> tuple[int, int, int]:
    """Return the rows and tokens of a batch, and how many steps are timed."""
    return (4, 2048, 8) if place.cuda else (2, 16, 2)


def _folder(place: Place, layers: int | None = None) -> Path:
    """Return a folder with the model in bfloat16, or one of its first *layers*, made once."""
    folder, config = place.shared / f"large-{layers}", _config(place)
    config.num_hidden_layers = layers or config.num_hidden_layers
    if not folder.exists():
        torch.manual_seed(0)
        with place.device:
            model = LlamaForCausalLM(config).to(torch.bfloat16)
        model.save_pretrained(folder)
    return folder


def _batch(place: Place, step: int) -> dict[str, Any]:
    rows, length, _ = _shape(place)
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, _config(place).vocab_size, (rows, length), generator=generator)
    return {"input_ids": tokens, "labels": tokens.clone()}


def _timed(place: Place, record: Record, step: Callable[[dict[str, Any]], float]) -> None:
    """Write down the speed, the peak memory and the losses of *step*."""
    rows, length, count = _shape(place)
    place.forget_peak()
    seconds, losses = [], []
    for number in range(_WARM_UP + count):
        batch = _batch(place, number)
        place.settle()
        start = time.perf_counter()
        losses.append(step(batch))
        place.settle()
        seconds.append(time.perf_counter() - start)
    middle = statistics.median(seconds[_WARM_UP:])
    record.note("tokens per second", round(rows * length / middle))
    record.note(
        "milliseconds of a step", {"median": round(1e3 * middle, 1), "all": [round(1e3 * s, 1) for s in seconds]}
    )
    record.note("peak memory", f"{place.peak():.0f} MiB")
    record.note("losses", [round(loss, 4) for loss in losses])


def step_ours(place: Place, record: Record) -> None:
    """Our loop, float32 weights, computed in bfloat16."""
    _ours(place, record, fused=False)


def step_ours_with_a_fused_optimizer(place: Place, record: Record) -> None:
    """The same with ``AdamW(fused=True)``, which the Trainer takes by default."""
    _ours(place, record, fused=True)


def _ours(place: Place, record: Record, fused: bool) -> None:
    folder = _folder(place)
    with place.one_rank():
        setup = DistributedSetup.build(device_type=place.device_type)
        model = NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
        runtime = setup.runtime(model)
        optimizer = runtime.optimizer(torch.optim.AdamW, lr=1e-4, fused=fused)

        def step(batch: dict[str, Any]) -> float:
            loss = runtime.forward_backward(batch)
            runtime.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()

        _timed(place, record, step)


def step_by_hand(place: Place, record: Record) -> None:
    """The same with fully_shard by hand."""
    folder = _folder(place)
    with place.one_rank():
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).to(place.device).train()
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        shard(model, init_device_mesh(place.device.type, (1,)), mp_policy=policy)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def step(batch: dict[str, Any]) -> float:
            loss = model(**{name: value.to(place.device) for name, value in batch.items()}).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return float(loss.item())

        _timed(place, record, step)


def step_of_trainer(place: Place, record: Record) -> None:
    """The Trainer of transformers in bfloat16 autocast."""
    folder, (rows, length, count) = _folder(place), _shape(place)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    data = [
        {name: value[row] for name, value in _batch(place, step).items()}
        for step in range(_WARM_UP + count)
        for row in range(rows)
    ]
    marks: list[float] = []

    class Clock(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            place.settle()
            marks.append(time.perf_counter())

    arguments = transformers.TrainingArguments(
        output_dir=str(place.folder / "trainer"), per_device_train_batch_size=rows, max_steps=_WARM_UP + count,
        bf16=place.cuda, report_to=[], save_strategy="no", logging_strategy="no", learning_rate=1e-4,
        lr_scheduler_type="constant", disable_tqdm=True, use_cpu=not place.cuda, weight_decay=0.01,
    )  # fmt: skip
    place.forget_peak()
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Clock()])
    trainer.train()
    middle = statistics.median(b - a for a, b in zip(marks[_WARM_UP - 1 :], marks[_WARM_UP:], strict=False))
    record.note("tokens per second", round(rows * length / middle))
    record.note("milliseconds of a step", round(1e3 * middle, 1))
    record.note("peak memory", f"{place.peak():.0f} MiB")


def checkpoints(place: Place, record: Record) -> None:
    """Loading, saving and resuming 4 layers of that model, against transformers and torch's own checkpoints."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    folder = _folder(place, layers=4)
    record.note(
        "bytes in the files", f"{sum(file.stat().st_size for file in folder.iterdir()) / 2**30:.2f} GiB, bfloat16"
    )

    def seconds(what: str, run: Callable[[], Any]) -> Any:
        place.settle()
        start = time.perf_counter()
        found = run()
        place.settle()
        record.note(what, f"{time.perf_counter() - start:.2f} s")
        return found

    with place.one_rank():
        setup = DistributedSetup.build(device_type=place.device_type)

        def load() -> Any:
            return NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)

        load()
        seconds(
            "load, transformers, then to the device",
            lambda: LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).to(place.device),
        )
        place.forget_peak()
        model = seconds("load, ours", load)
        record.note("load, ours: peak", f"{place.peak():.0f} MiB")
        runtime = setup.runtime(model)
        optimizer = runtime.optimizer(torch.optim.AdamW, lr=1e-4)
        runtime.forward_backward(_batch(place, 0))
        optimizer.step()
        optimizer.zero_grad()
        for turn in range(2):
            saved = place.folder / f"saved-{turn}"
            seconds(f"save, ours, turn {turn}", lambda saved=saved: runtime.save(saved, optimizer))
            weights, moments = get_state_dict(runtime.model, optimizer)
            target = place.folder / f"dcp-{turn}"
            seconds(
                f"save, torch's, turn {turn}",
                lambda w=weights, m=moments, t=target: dcp.save({"w": w, "m": m}, checkpoint_id=t),
            )
            handle = seconds(
                f"blocked by an asynchronous save, ours, turn {turn}",
                lambda turn=turn: runtime.save(place.folder / f"late-{turn}", optimizer, asynchronous=True),
            )
            seconds("and until it is durable", handle.wait)
            seconds("load, ours", lambda saved=saved: runtime.load(saved, optimizer))
            for used in (saved, target, place.folder / f"late-{turn}"):
                shutil.rmtree(used, ignore_errors=True)
        with record.attempt("copies to the host"):
            _copies(place, record)
        dist.barrier()


def _copies(place: Place, record: Record) -> None:
    """How fast 1 GiB comes to the host, to memory that is new, pageable and pinned."""
    if not place.cuda:
        return
    source = torch.empty(2**28, device=place.device)
    pageable, pinned = torch.empty(2**28), torch.empty(2**28, pin_memory=True)
    pageable.zero_()
    for what, run in (
        ("new memory", lambda: source.cpu()),
        ("pageable memory that is kept", lambda: pageable.copy_(source)),
        ("pinned memory that is kept", lambda: pinned.copy_(source, non_blocking=True)),
    ):
        place.settle()
        start = time.perf_counter()
        run()
        place.settle()
        record.note(f"1 GiB to {what}", f"{1.0 / (time.perf_counter() - start):.1f} GiB/s")
